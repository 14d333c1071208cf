"""Multi-token prediction: the loss is the paper's, it reaches the trunk, and transformers drafts with what we save."""

from pathlib import Path

import torch
import transformers
from torch.nn import functional as F

from beringia.model import Decoder, load_model, save_model


def model() -> Decoder:
    decoder = load_model("r2-nano", seed=6)
    with torch.no_grad():  # norms other than one, so that leaving one out would show
        for name, parameter in decoder.named_parameters():
            if name.endswith("norm.weight"):
                parameter.normal_(1.0, 0.2, generator=torch.Generator().manual_seed(len(name)))
    return decoder


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, 54, (3, 12), generator=generator)
    labels = torch.cat((tokens[:, 1:], torch.full((3, 1), -100)), dim=1)
    labels[1, :5] = -100
    return tokens, labels


def test_losses_are_sums_over_targets() -> None:
    decoder, (tokens, labels) = model(), batch()
    losses = decoder(tokens, labels)
    log_p = decoder(tokens).log_softmax(-1)
    wanted = -sum(log_p[b, t, labels[b, t]] for b in range(3) for t in range(12) if labels[b, t] != -100)
    torch.testing.assert_close(losses.main_sum, wanted)
    assert int(losses.target_count) == 3 * 11 - 5
    assert int(losses.mtp_count) == 3 * 10 - 4  # the same labels without each row's first


def test_losses_of_parts_add_up_to_the_loss_of_the_whole() -> None:
    decoder, (tokens, labels) = model(), batch()
    whole = decoder(tokens, labels)
    parts = [decoder(tokens[b : b + 1], labels[b : b + 1]) for b in range(3)]
    for index, value in enumerate(whole):
        torch.testing.assert_close(sum(part[index] for part in parts), value)


def test_the_multi_token_loss_is_the_papers_formula() -> None:
    decoder, (tokens, labels) = model(), batch()
    layer, trunk = decoder.mtp, decoder.model
    assert layer is not None
    hidden: list[torch.Tensor] = []
    handle = trunk.norm.register_forward_hook(lambda *event: hidden.append(event[2]))
    found = decoder(tokens, labels).mtp_sum
    handle.remove()
    # h'_t = M [norm(emb(t + 1)); norm(h_t)], one layer, the model's own head; the target is token t + 2.
    embedded = trunk.embed_tokens.weight[tokens[:, 1:]]

    def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    joined = torch.cat((normed(embedded, layer.enorm.weight), normed(hidden[0][:, :-1], layer.hnorm.weight)), -1)
    out = layer(joined @ layer.eh_proj.weight.t(), decoder.rope(torch.arange(11)))
    logits = normed(out, layer.shared_head.norm.weight) @ decoder.lm_head.weight.t()
    wanted = F.cross_entropy(logits[:, :10].flatten(0, 1), labels[:, 1:11].flatten(), reduction="sum")
    torch.testing.assert_close(found, wanted)


def test_its_gradient_reaches_the_trunk_and_the_embedding() -> None:
    decoder, (tokens, labels) = model(), batch()
    decoder(tokens, labels).mtp_sum.backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.norm()) > 0, name


def test_without_it_its_weights_get_no_gradient_and_the_main_loss_is_the_same() -> None:
    decoder, (tokens, labels) = model(), batch()
    with_it, without = decoder(tokens, labels), decoder(tokens, labels, mtp=False)
    assert torch.equal(with_it.main_sum, without.main_sum)
    assert (float(without.mtp_sum), int(without.mtp_count)) == (0.0, 0)
    without.main_sum.backward()
    assert decoder.mtp is not None
    assert all(parameter.grad is None for parameter in decoder.mtp.parameters())


def test_transformers_computes_the_same_multi_token_logits(tmp_path: Path) -> None:
    decoder, (tokens, _) = model(), batch()
    save_model(decoder, tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    hidden = theirs.model(tokens, use_cache=False).last_hidden_state
    layer = decoder.mtp
    assert layer is not None
    rope = decoder.rope(torch.arange(11))
    ours = decoder.lm_head(layer.predict(hidden[:, :-1], decoder.model.embed_tokens(tokens[:, 1:]), rope))
    block = transformers_mtp_layer(theirs, layer.state_dict())
    embedded = theirs.model.embed_tokens(tokens[:, 1:])
    positions = torch.arange(11).unsqueeze(0)
    mask = torch.full((11, 11), float("-inf")).triu(1)[None, None]
    position_embeddings = theirs.model.rotary_emb(embedded, positions)
    drafted = block(embedded, hidden[:, :-1], position_embeddings, mask, positions, None)
    torch.testing.assert_close(ours, theirs.lm_head(drafted), rtol=1e-5, atol=1e-6)


def transformers_mtp_layer(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    from transformers.modeling_layers import MtpLayer

    decoder_layer, norm = type(model.model.layers[-1]), type(model.model.norm)
    layer = MtpLayer(model.config, decoder_layer, norm, model.config.num_hidden_layers)
    outside = ("enorm", "hnorm", "eh_proj")
    renamed = {name if name.startswith(outside) else f"mtp_block.{name}": tensor for name, tensor in weights.items()}
    renamed["post_norm.weight"] = renamed.pop("mtp_block.shared_head.norm.weight")
    layer.load_state_dict(renamed)
    return layer
