"""Is a chip fit to train a model, to serve it, or neither: evidence, a verdict, and the first operator that is wrong.

Start in `qualification.py`: a bundle (`reference.py`, `bundle.py`) from a reference that is sound
(`sound_reference.py`), the probes of the candidate (`candidate.py`, in its own process: `worker.py`, `probing.py`;
`recomputed.py` for another machine's bundle), then `locate.py` and `verdict.py`. `operators/` holds
calls against float64, `trace.py` and `effects.py` what they do to the model, `arithmetic/` and `hardware/` the chip
without a model. What is qualified is a `subject.py`. Certificates are `records/certificate.py`. See `docs/qualify.md`.
"""
