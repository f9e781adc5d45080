"""model.save and fastvae.load: the same model again, whole files or none, and what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastvae
from fastvae import likelihoods, penalties
from fastvae.architectures import image_decoder, image_encoder, image_networks
from fastvae.data import ColorJitter, Compose, RandomAffine, RandomFlip

pytest.importorskip("safetensors")

SHAPE = (3, 8, 8)


def networks(outputs: int = 1) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return image_networks(SHAPE, 4, width=2, values_per_element=outputs)


def views() -> Compose:
    return Compose(RandomAffine(degrees=3.0, scale=(0.8, 1.0)), RandomFlip(), ColorJitter())


MODELS: dict[str, Callable[[], fastvae.models.BaseVAE]] = {
    "VAE": lambda: fastvae.VAE(*networks(), beta=2.0, max_logvar=10.0, check_finite=False),
    "VAE, learned scale": lambda: fastvae.VAE(*networks(), likelihoods.Gaussian("learned", shape=(3, 1, 1))),
    "VAE, fixed scales": lambda: fastvae.VAE(*networks(), likelihoods.Gaussian(torch.rand(3, 1, 1) + 0.5)),
    "VAE, categorical": lambda: fastvae.VAE(*networks(4), likelihoods.Categorical(4)),
    "VAE, counts": lambda: fastvae.VAE(*networks(2), likelihoods.NegativeBinomial("decoder")),
    "VAE, learned dispersion": lambda: fastvae.VAE(*networks(), likelihoods.NegativeBinomial("learned")),
    "VAE, penalties": lambda: fastvae.VAE(
        *networks(),
        penalties=[
            penalties.BetaAnnealing(5, cycle_steps=9, num_cycles=2),
            penalties.FreeBits(0.1, per="sample"),
        ],
    ),
    "HVAE": lambda: fastvae.HVAE(
        *networks(), num_steps=3, step_size=0.1, max_step_size=0.3, on_divergence="drop"
    ),
    # K = d, where one size might be taken for the other.
    "HVAE, a step size a dimension": lambda: fastvae.HVAE(
        *networks(),
        num_steps=4,
        tempering="fixed",
        step_size=torch.rand(1, 4) * 0.2 + 0.01,
        learn_step_size=False,
    ),
    "HVAE, one a step": lambda: fastvae.HVAE(
        *networks(), num_steps=4, tempering="none", step_size=torch.rand(4, 1) * 0.2 + 0.01
    ),
    "IWAE": lambda: fastvae.IWAE(*networks(), num_samples=3, estimator="dreg"),
    "JacobianL1VAE": lambda: fastvae.JacobianL1VAE(
        *networks(), gamma=0.3, anneal_steps=7, estimator="difference", step=1e-3
    ),
    "ConsistencyVAE": lambda: fastvae.ConsistencyVAE(*networks(), augment=views(), noise="common"),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_same_model_again(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    x = torch.rand(4, *SHAPE).round()
    for penalty in model.penalties:
        if hasattr(penalty, "step"):
            penalty.step()
    model.encode(x)
    state = torch.get_rng_state()
    assert model.save(tmp_path / "run") == tmp_path / "run"
    again = fastvae.load(tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), state)
    assert type(again) is type(model) and not again.training and model.training
    assert repr(again) == repr(model)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
    for call in (
        lambda model, generator: model(x, generator=generator),
        lambda model, generator: model.log_likelihood(x, 5, generator=generator),
    ):
        values = [call(m, torch.Generator().manual_seed(1)) for m in (model.eval(), again)]
        assert torch.equal(*values)


def test_precision_and_frozen_parameters(tmp_path: Path) -> None:
    model = MODELS["VAE, learned scale"]().double()
    model.encoder.requires_grad_(False)
    again = fastvae.load(model.save(tmp_path))
    assert {p.dtype for p in again.parameters()} == {torch.float64}
    assert not any(p.requires_grad for p in again.encoder.parameters())
    assert all(p.requires_grad for p in again.decoder.parameters())


def test_saved_over_and_over(tmp_path: Path) -> None:
    model = MODELS["VAE"]()
    model.save(tmp_path)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    (tmp_path / ".model.json.0123456789abcdef.tmp").write_text("left by a process that was killed")
    model.save(tmp_path)
    model.save(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 2 and names[0] == "model.json" and names[1].startswith("weights-")
    assert torch.equal(next(fastvae.load(tmp_path).parameters()), next(model.parameters()))


class OwnEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(192, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x.flatten(1))


class OwnVAE(fastvae.VAE):
    pass


class OwnPenalty(penalties.FreeBits):
    pass


class OwnDensity(likelihoods.Bernoulli):
    pass


def test_parts_of_ones_own_are_given_again(tmp_path: Path) -> None:
    model = fastvae.VAE(OwnEncoder(), networks()[1], OwnDensity(), penalties=[OwnPenalty(0.1)])
    model.save(tmp_path)
    parts: dict[str, Any] = {}
    for name, part in (
        ("encoder", OwnEncoder()),
        ("likelihood", OwnDensity()),
        ("penalties", [OwnPenalty(0.1)]),
    ):
        with pytest.raises(
            ValueError, match=rf"model\.json: expected {name}=, .* but test_saving\.Own\w+, built"
        ):
            fastvae.load(tmp_path, **parts)
        parts[name] = part
    again = fastvae.load(tmp_path, **parts)
    assert again.encoder is parts["encoder"]
    assert torch.equal(again.encoder.map.weight, model.encoder.map.weight)

    OwnVAE(*networks()).save(tmp_path / "own")
    with pytest.raises(ValueError, match=r"expected model=, .* test_saving\.OwnVAE"):
        fastvae.load(tmp_path / "own")
    mine = OwnVAE(*networks())
    assert fastvae.load(tmp_path / "own", model=mine) is mine
    with pytest.raises(ValueError, match="either a whole model or parts"):
        fastvae.load(tmp_path / "own", model=mine, encoder=OwnEncoder())


@pytest.mark.parametrize("change", ["layer", "hook", "parametrisation"])
def test_a_network_changed_since_it_was_made_is_ones_own(change: str, tmp_path: Path) -> None:
    encoder, decoder = networks()
    if change == "layer":
        decoder[1] = nn.ReLU()
    elif change == "hook":
        decoder[0].register_forward_hook(lambda *_: None)
    else:
        torch.nn.utils.parametrizations.weight_norm(decoder[0])
    fastvae.VAE(encoder, decoder).save(tmp_path)
    with pytest.raises(ValueError, match=r"expected decoder=, .* torch\.nn\.modules\.container\.Sequential"):
        fastvae.load(tmp_path)


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    def build() -> fastvae.VAE:
        decoder = nn.Sequential(nn.Linear(4, 4), nn.ELU(), nn.Linear(4, 4), nn.Linear(4, 192))
        decoder[2].weight = decoder[0].weight
        return fastvae.VAE(OwnEncoder(), decoder)

    model, other = build(), build()
    again = fastvae.load(model.save(tmp_path), encoder=other.encoder, decoder=other.decoder)
    assert again.decoder[2].weight is again.decoder[0].weight
    assert torch.equal(again.decoder[0].weight, model.decoder[0].weight)


def test_what_was_given_is_unchanged_where_it_does_not_fit(tmp_path: Path) -> None:
    fastvae.VAE(*networks()).save(tmp_path)
    other = image_encoder(SHAPE, 4, width=3)
    before = [p.clone() for p in other.parameters()]
    with pytest.raises(ValueError, match=r"expected the weights of this model, found encoder\.\d+\.\w+: \["):
        fastvae.load(tmp_path, encoder=other)
    assert all(torch.equal(p, b) for p, b in zip(other.parameters(), before, strict=True))
    with pytest.raises(
        ValueError, match=r"found decoder\.0\.weight: \[256, 4\], where the model has \[256, 5\]"
    ):
        fastvae.load(tmp_path, decoder=image_decoder(SHAPE, 5, width=2))


def changed(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another format": (lambda c: c.update(format="x"), "no 'fastvae model'"),
    "no version": (lambda c: c.pop("version"), "version None"),
    "a later version": (
        lambda c: c.update(version=2, fastvae="9.0"),
        r"expected version 1 .*, found version 2, written by fastvae 9\.0; this is \d",
    ),
    "weights elsewhere": (lambda c: c["weights"].update(file="../../weights"), "weights: '../../weights'"),
    "no decoder": (lambda c: c.pop("decoder"), "decoder: NoneType"),
    "an unknown architecture": (lambda c: c["decoder"].update(name="system"), "an architecture 'system'"),
    "a network as large as the world": (
        lambda c: c["decoder"]["arguments"].update(width=10**9),
        "where the model has",
    ),
    "a setting that is none": (lambda c: c["model"]["settings"].update(beta="x"), "beta"),
    "an unknown setting": (lambda c: c["model"]["settings"].update(command="rm"), "command"),
    "an unknown model": (lambda c: c["model"].update({"class": "object"}), "a model 'object'"),
    "an unknown likelihood": (lambda c: c["likelihood"].update({"class": "eval"}), "a part 'eval'"),
    "a penalty for a likelihood": (
        lambda c: c.update(likelihood={"class": "FreeBits", "settings": {"nats": 1.0, "per": "batch"}}),
        "likelihood",
    ),
    "frozen": (lambda c: c.update(frozen=3), "frozen: int"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_settings_are_refused(case: str, tmp_path: Path) -> None:
    change, message = DAMAGE[case]
    MODELS["VAE"]().save(tmp_path)
    changed(tmp_path / "model.json", change)
    with pytest.raises(ValueError, match=rf"model\.json: .*{message}"):
        fastvae.load(tmp_path)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"found no .*model\.json"):
        fastvae.load(tmp_path)
    MODELS["VAE"]().save(tmp_path)
    with pytest.raises(FileNotFoundError, match="got a file"):
        fastvae.load(tmp_path / "model.json")
    (weights,) = tmp_path.glob("weights-*")
    whole = weights.read_bytes()
    for data in (whole[:-1], whole[:50] + b"\0" + whole[51:], b""):
        weights.write_bytes(data)
        with pytest.raises(ValueError, match=r"weights-\w+\.safetensors: .*another checksum"):
            fastvae.load(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match=r"model\.json: .*no weights-\w+\.safetensors beside it"):
        fastvae.load(tmp_path)
    for text in ("", "[" * 100_000, '{"format": "fastvae model"', "[]", "\xff" * 2**21):
        (tmp_path / "model.json").write_text(text)
        with pytest.raises(ValueError, match=r"model\.json: expected what model\.save wrote"):
            fastvae.load(tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
def test_a_disk_that_is_full_leaves_the_model_from_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MODELS["VAE"]()
    model.save(tmp_path)
    before = fastvae.load(tmp_path).state_dict()
    with torch.no_grad():
        next(model.parameters()).add_(1)
    monkeypatch.setattr(
        os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError, match=r"what was there before is unchanged: No space.*weights-"):
        model.save(tmp_path)
    after = fastvae.load(tmp_path).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
