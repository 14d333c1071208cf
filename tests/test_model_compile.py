"""The compiled decoder computes what the eager one computes."""

from dataclasses import replace

import pytest
import torch

from beringia.model import Decoder, initialise, preset

# Both are float32 programs of the same formulas that add in another order; measured 1e-6 on r2-micro, where the largest
# sums have 2048 terms: sqrt(2048) unit roundoffs are 2.7e-6. Four times that.
AGREEMENT = 4 * 2048**0.5 * 2.0**-24


# The compiler imports what torch calls deprecated, and asks non-leaf tensors for their gradient.
@pytest.mark.filterwarnings("default")
@pytest.mark.slow
def test_compiled_losses_and_gradients_are_those_of_eager() -> None:
    tokens = torch.randint(0, 54, (8, 33), generator=torch.Generator().manual_seed(3))
    labels = tokens[:, 1:].contiguous()
    # One dense and one sparse layer: compiling more of the same takes minutes and shows nothing new.
    config = replace(preset("r2-nano"), num_hidden_layers=2, num_nextn_predict_layers=0)
    eager, compiled = Decoder(config), Decoder(config)
    initialise(eager, 1)
    initialise(compiled, 1)
    compiled.leave_experts_eager()
    forward = torch.compile(compiled)
    for call in (eager, forward):
        losses = call(tokens[:, :-1], labels)
        (losses.main_sum / losses.target_count).backward()
    wanted = dict(eager.named_parameters())
    for name, parameter in compiled.named_parameters():
        gradient, reference = parameter.grad, wanted[name].grad
        assert gradient is not None and reference is not None
        assert float((gradient - reference).norm() / reference.norm()) <= AGREEMENT, name
    for index, counts in compiled.expert_counts().items():
        assert torch.equal(counts, eager.expert_counts()[index])
