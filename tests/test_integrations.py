"""fastvae.integrations against the real libraries."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import peer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastvae
from fastvae.integrations.pythae import from_pythae
from fastvae.lowering import UnsupportedLayer, lower
from fastvae.models import SelectOutputs
from fastvae.penalties import JacobianL1

SHAPE = (1, 4, 4)
DIM = 3


def images(count: int = 20, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(1))


# --- pythae ------------------------------------------------------------------------------------


def pythae_model(kind: str = "VAE", loss: str = "bce", **config: Any) -> nn.Module:
    models = peer("pythae.models")
    torch.manual_seed(0)
    settings = getattr(models, kind + "Config")(input_dim=SHAPE, latent_dim=DIM, **config)
    if hasattr(settings, "reconstruction_loss"):
        settings.reconstruction_loss = loss
    model: nn.Module = getattr(models, kind)(settings)
    return model


@pytest.mark.parametrize("loss", ["mse", "bce"])
@pytest.mark.parametrize("kind", ["VAE", "BetaVAE"])
def test_pythae_loss_and_gradient(kind: str, loss: str) -> None:
    """With the same noise, pythae's own loss, but for the Gaussian's constant, and its gradient."""
    theirs = pythae_model(kind, loss, **({"beta": 3.0} if kind == "BetaVAE" else {}))
    ours = from_pythae(theirs)
    assert type(ours) is fastvae.VAE and ours.latent_dim == DIM
    assert {id(p) for p in ours.parameters()} == {id(p) for p in theirs.parameters()}
    x = images()
    torch.manual_seed(5)
    expected = theirs({"data": x}).loss
    torch.manual_seed(5)
    loss_of_ours = ours.loss(x)
    constant = math.prod(SHAPE) / 2 * math.log(2 * math.pi) if loss == "mse" else 0.0
    # float32: sums of 16 terms in another order.
    torch.testing.assert_close(loss_of_ours, expected + constant, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(expected, list(theirs.parameters()))
    got = torch.autograd.grad(loss_of_ours, list(theirs.parameters()))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_pythae_likelihood_agrees() -> None:
    """Importance sampling estimates the same evidence; both have errors of a few hundredths of a nat."""
    theirs = pythae_model(loss="mse")
    x = images(3)
    torch.manual_seed(0)
    expected = theirs.get_nll(x, n_samples=2000, batch_size=500)
    got = from_pythae(theirs).log_likelihood(x, 2000, generator=torch.Generator().manual_seed(0)).mean()
    assert abs(got.item() - expected) < 0.05


@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_pythae_networks_run_in_the_fused_flow(loss: str) -> None:
    model = from_pythae(
        pythae_model(loss=loss), fastvae.HVAE, num_steps=3, penalties=[JacobianL1(0.1)], step_size=0.1
    )
    assert lower(model.decoder).spec.startswith("linear 0 1;relu;linear 2 3;sigmoid")
    x = images()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.loss(x, generator=torch.Generator().manual_seed(0)).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("data", "network", "lowers"),
    [("mnist", "Decoder_Conv_AE_MNIST", True), ("mnist", "Decoder_ResNet_AE_MNIST", False)],
)
def test_pythae_benchmark_networks(data: str, network: str, lowers: bool) -> None:
    peer("pythae.models")
    module = peer(f"pythae.models.nn.benchmarks.{data}")
    config = peer("pythae.models").VAEConfig(input_dim=(1, 28, 28), latent_dim=DIM)
    decoder = SelectOutputs(getattr(module, network)(config), "reconstruction").eval()
    if lowers:
        assert lower(decoder).spec.endswith("sigmoid")
        return
    with pytest.raises(UnsupportedLayer, match=r"layer 'network.layers.2.0' \(add\)"):
        lower(decoder)


def test_fit_takes_pythaes_loaders(tmp_path: Path) -> None:
    datasets = peer("pythae.data.datasets")
    loader = DataLoader(datasets.BaseDataset(images(), torch.zeros(20)), batch_size=10)
    theirs = pythae_model()
    before = [p.detach().clone() for p in theirs.parameters()]
    history = fastvae.fit(from_pythae(theirs), loader, epochs=2, progress=False)
    assert history.train_loss[1] < history.train_loss[0]
    assert not any(torch.equal(a, b) for a, b in zip(before, theirs.parameters(), strict=True))
    theirs.save(str(tmp_path))
    loaded = from_pythae(type(theirs).load_from_folder(str(tmp_path)))
    x = images()
    torch.testing.assert_close(loaded.decode(loaded.encode(x)[0]), theirs_decoded(theirs, x))


def theirs_decoded(model: nn.Module, x: Tensor) -> Tensor:
    return torch.logit(model.decoder(model.encoder(x).embedding)["reconstruction"])  # type: ignore[operator]


def test_pythae_refusals() -> None:
    with pytest.raises(
        TypeError, match="from_pythae: model: expected a pythae model, got Linear without encoder"
    ):
        from_pythae(nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match="reconstruction_loss: expected 'mse' or 'bce', got None in AEConfig"
    ):
        from_pythae(pythae_model("AE"))
    ae = from_pythae(pythae_model("AE"), likelihood="gaussian")
    with pytest.raises(
        ValueError, match=r"Encoder_AE_MLP: expected an output at 'log_covariance', got none; .* 'embedding'"
    ):
        ae.elbo(images())


# --- Lightning ---------------------------------------------------------------------------------


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Any]:
    """A quiet Trainer's constructor, in an empty folder."""
    lightning = peer("lightning")
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)

    def make(**options: Any) -> Any:
        return lightning.Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            **{"max_epochs": 2, **options},
        )

    with warnings.catch_warnings():
        # Advice about the number of workers, and Lightning's own use of what torch deprecated.
        warnings.simplefilter("ignore")
        yield make
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def model_of(kind: type[Any] = fastvae.HVAE) -> Any:
    torch.manual_seed(0)
    pixels = math.prod(SHAPE)
    options: dict[str, Any] = {"num_steps": 2} if kind is fastvae.HVAE else {}
    return kind(
        nn.Sequential(nn.Flatten(), nn.Linear(pixels, 2 * DIM)),
        nn.Sequential(nn.Linear(DIM, 8), nn.Softplus(), nn.Linear(8, pixels)),
        penalties=[JacobianL1(0.1, anneal_steps=100)],
        **options,
    )


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(images()), batch_size=5)


@pytest.mark.parametrize("kind", [fastvae.VAE, fastvae.HVAE])
def test_lightning_wrapper_trains_and_resumes(kind: type[Any], trainer: Any, tmp_path: Path) -> None:
    peer("lightning")
    from fastvae.integrations.lightning import LitVAE

    lit = LitVAE(model_of(kind), optimizer=torch.optim.SGD, lr=1e-3)
    start = fastvae.VAE.elbo(lit.model, images()).mean().item()
    run = trainer()
    run.fit(lit, loader(), loader())
    assert set(run.callback_metrics) == {"train_loss", "val_loss", "val_elbo"}
    assert run.callback_metrics["val_elbo"] > start
    penalty = lit.model.penalties[0]
    assert penalty.steps_taken == run.global_step == 8
    run.save_checkpoint(tmp_path / "lit.ckpt")
    again = LitVAE.load_from_checkpoint(tmp_path / "lit.ckpt", model=model_of(kind), weights_only=True)
    for name, value in lit.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value)
    resumed = LitVAE(model_of(kind), optimizer=torch.optim.SGD, lr=1e-3)
    longer = trainer(max_epochs=3)
    longer.fit(resumed, loader(), ckpt_path=tmp_path / "lit.ckpt", weights_only=True)
    assert longer.global_step == resumed.model.penalties[0].steps_taken == 12


@pytest.mark.parametrize(
    ("scheduler", "options", "rates"),
    [
        (lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.1), {}, [1e-2, 1e-3, 1e-4]),
        (lambda o: torch.optim.lr_scheduler.StepLR(o, 4, 0.1), {"schedule_by": "step"}, [1e-2, 1e-3, 1e-4]),
        (
            # No loss is low enough.
            lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(
                o, patience=0, threshold=1e9, threshold_mode="abs"
            ),
            {},
            [1e-2, 1e-2, 1e-3],
        ),
    ],
    ids=["epoch", "step", "plateau"],
)
def test_lightning_schedules_and_tests(
    scheduler: Any, options: Any, rates: list[float], trainer: Any
) -> None:
    peer("lightning")
    from fastvae.integrations.lightning import LitVAE

    lit = LitVAE(model_of(fastvae.VAE), optimizer=torch.optim.SGD, lr=1e-2, scheduler=scheduler, **options)
    found = []
    lit.on_train_epoch_start = lambda: found.append(lit.optimizers().param_groups[0]["lr"])  # type: ignore[method-assign]
    run = trainer(max_epochs=3)
    run.fit(lit, loader(), loader())
    assert found == pytest.approx(rates)
    torch.manual_seed(0)
    (results,) = run.test(lit, loader(), verbose=False)
    assert set(results) == {"test_loss", "test_elbo"}
    # One draw of noise each: 20 samples of some nats.
    assert results["test_loss"] == pytest.approx(-results["test_elbo"], rel=0.2)


def test_lightning_arguments() -> None:
    peer("lightning")
    from fastvae.integrations.lightning import LitVAE

    with pytest.raises(ValueError, match="LitVAE: schedule_by: expected 'epoch' or 'step', got 'batch'"):
        LitVAE(model_of(), schedule_by="batch")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"LitVAE: scheduler: expected an LRScheduler .*, got SGD"):
        LitVAE(model_of(), optimizer=torch.optim.SGD, scheduler=lambda o: o).configure_optimizers()  # type: ignore[arg-type,return-value]


def test_lightning_accumulates_batches(trainer: Any) -> None:
    """The penalties count optimisation steps, not batches."""
    peer("lightning")
    from fastvae.integrations.lightning import LitVAE

    lit = LitVAE(model_of())
    trainer(max_epochs=1, accumulate_grad_batches=2).fit(lit, loader())
    assert lit.model.penalties[0].steps_taken == 2
    with pytest.raises(TypeError, match="LitVAE: model: expected a fastvae model, got Linear"):
        LitVAE(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_a_model_inside_your_own_lightning_module(trainer: Any, tmp_path: Path) -> None:
    lightning = peer("lightning")

    class Mine(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.vae = model_of()

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss: Tensor = self.vae.loss(batch[0])
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-2)

    mine = Mine()
    before = mine.vae.elbo(images()).mean().item()
    run = trainer(max_epochs=5)
    run.fit(mine, loader())
    assert mine.vae.elbo(images()).mean().item() > before
    run.save_checkpoint(tmp_path / "mine.ckpt")
    loaded = Mine.load_from_checkpoint(tmp_path / "mine.ckpt", weights_only=True)
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), loaded.parameters(), strict=True))
