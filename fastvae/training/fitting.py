"""``fit``: what it takes, and the run that it starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset

from fastvae.arguments import expect, expect_choice, expect_integers, expect_numbers, is_integer
from fastvae.modes import modes_kept
from fastvae.randomness import global_generators_kept
from fastvae.training.batches import Place
from fastvae.training.callbacks import Callback, EarlyStopping
from fastvae.training.history import History
from fastvae.training.loaders import as_loader
from fastvae.training.locking import run_folder_held
from fastvae.training.parallel import Team
from fastvae.training.run import Run
from fastvae.training.step import Stepper, parameters_of

__all__ = ["build_scheduler", "fit"]


def fit(
    model: nn.Module,
    loader: Iterable[Any] | Dataset[Any],
    *,
    epochs: int,
    batch_size: int | None = None,
    optimizer: Optimizer | Callable[[list[nn.Parameter]], Optimizer] | None = None,
    val_loader: Iterable[Any] | Dataset[Any] | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    checkpoint_every: int | Literal["epoch", "never"] | None = "epoch",
    keep_latest: bool = False,
    resume: bool | str | os.PathLike[str] = "auto",
    device: torch.device | str | None = None,
    seed: int = 0,
    scheduler: LRScheduler | Callable[[Optimizer], LRScheduler] | None = None,
    schedule_by: Literal["epoch", "step"] = "epoch",
    patience: int | None = None,
    callbacks: Iterable[Callback] = (),
    max_steps: int | None = None,
    clip_grad_norm: float | None = None,
    binarize: bool = False,
    condition: Place | None = None,
    weight: Place | None = None,
    sample_weight: Place | None = None,
    cuda_graph: bool = False,
    grad_scaler: torch.amp.GradScaler | Literal["auto"] | None = "auto",
    on_nonfinite: Literal["raise", "skip"] = "raise",
    on_difference: Literal["raise", "warn"] = "raise",
    progress: bool = True,
) -> History:
    """Minimise ``model(x).mean()`` over the batches of ``loader``.

    A run that was killed and is started again with the same arguments ends with the same losses and weights,
    bit for bit, as one that was not (on one machine, with deterministic kernels). For that, torch's, numpy's
    and Python's global generators are seeded from (seed, epoch) at the start of every epoch, and the states
    of the loaders' own generators are stored; ``fit`` gives the global generators back as it found them.
    Out of reach are generators hidden in data sets or models, and workers kept by ``persistent_workers``.

    After Ctrl-C a run with checkpoints takes its step to the end and writes a checkpoint in the middle of the epoch,
    from which it goes on (batches before it are loaded again); a second Ctrl-C does not wait.

    Under ``torch.autocast(device, torch.bfloat16)`` around the call, encoders (and decoders that no kernel takes) run
    in bfloat16; the operators compute in float32 as ever, weights and optimiser stay as they are. Under float16 losses
    are scaled, by ``grad_scaler``.

    Several processes (torchrun) train one model if each passes it in ``DistributedDataParallel``, with a loader of as
    many batches of its own part of the data (``DistributedSampler``) and the same arguments otherwise. Noise differs
    between them, losses are those of all, the first process writes to ``run_dir``, which all must see, and a step that
    is not finite in one is refused in all.

    Args:
        model: ``model(x)`` is the loss of each sample, [B]. Objects in ``model.penalties`` with a ``step()``
            are stepped after each optimisation step, and stored if they have ``state_dict``.
        loader: a ``Dataset``, of whose samples batches are made in a new order each epoch; or any iterable of batches
            that can be iterated once an epoch. A batch is a tensor, a tuple or list whose first entry is a tensor, or a
            mapping with "data". A sampler's ``set_epoch`` is called.
        epochs: in all, those of a resumed run included.
        batch_size: of a ``Dataset``, 128 unless given; an iterable of batches has its own.
        optimizer: an instance, or a callable from the list of trainable parameters (an optimiser class, a
            ``functools.partial``). None: Adam, 1e-3. Any ``torch.optim.Optimizer`` for dense gradients
            works; those whose ``step`` demands a closure (LBFGS) evaluate it with the same noise each time.
        val_loader: of the same kinds; its mean loss is computed after every epoch in eval mode, always with the same
            noise.
        run_dir: folder for ``epoch-0000.pt`` (the start), ``epoch-0001.pt``, ... and ``history.json``. While a run
            writes to it, no other can.
        checkpoint_every: "epoch"; an int, every so many epochs; "never" or None. The last is always kept.
        keep_latest: where that is not every epoch, write a checkpoint after each of the others, too, which the next one
            replaces: what kills a run takes less than an epoch from it.
        resume: "auto": from the newest undamaged checkpoint in ``run_dir`` (a damaged one is passed over with a
            warning), if there is any; True: there must be one; a path: from that file; False: start anew in
            a folder without checkpoints. A run that goes on in another folder takes its checkpoints along.
        device: where to move the model; None leaves it. Batches are moved to the model's device.
        seed: of shuffling and noise. Initial weights are the caller's: seed before building the model.
        scheduler: an instance for this optimiser, or a callable from it; ``ReduceLROnPlateau`` reads the
            validation loss, or the training loss without one.
        schedule_by: call the scheduler after each "epoch" or each "step".
        patience: stop after so many epochs without a lower validation loss; the best weights are put back
            at the end of the run. The same as ``callbacks=[EarlyStopping(patience)]``.
        callbacks: :class:`fastvae.training.Callback` objects, called in this order; their states are in checkpoints.
        max_steps: stop after so many optimisation steps, if need be within an epoch: its checkpoint
            ``step-00000123.pt`` counts in TracIn by its share of the epoch. A longer run goes on from there, and
            replaces it.
        clip_grad_norm: largest gradient norm.
        binarize: draw binary images anew in each step (:func:`fastvae.data.binarize`).
        condition: of a conditional model, where its condition is in a batch: an index (1: what stands behind the
            images), a key, or a function of the batch. The loss is then ``model(x, condition=c)``.
        weight: where the weights of x's elements are in a batch, in the same way: of the shape of x, 0 for what is
            missing. The loss is then ``model(x, weight=w)``.
        sample_weight: where in a batch is how much each sample counts, [B], at least 0, in each batch one above 0. The
            loss of a batch is then the weighted mean sum(w l) / sum(w) of its samples' losses l, which doubling all
            weights does not change; losses of an epoch, those of ``val_loader`` too, are such means over all samples.
            Several processes each take the mean of their own batch. None: the mean.
        cuda_graph: on a GPU, run forward and backward pass from a CUDA graph after the first batches of each shape:
            small networks then train as fast as the GPU is, not as fast as Python launches kernels. The same losses. A
            module's plain settings (``model.beta = 2``) may change, and the steps before which an HVAE measures its
            trajectories run as they are; what else Python decides in ``forward`` stays as it
            was captured, so that must depend on no number. Memory stays in use as for one more step.
        grad_scaler: a ``torch.amp.GradScaler``, which scales losses so that gradients in float16 do not vanish; its
            state is in checkpoints. A step whose gradients overflow leaves the weights, the scheduler and the count of
            steps as they were, is counted in ``History.skipped``, and halves the scale; at a scale of 1 or less it is
            one that is not finite. "auto": one of torch's defaults under autocast in float16, else none. None: none.
        on_nonfinite: a loss or gradient that is not finite, or a model's ``DivergenceError``, raises before
            it reaches the weights; or that step is skipped, counted, and BatchNorm's running statistics are
            put back (a diverged validation counts as infinite loss).
        on_difference: where the checkpoint is of another run: "raise" an error that names each difference with its old
            and its new value, or "warn" and go on. Compared are the modules' classes and settings (beta, likelihood,
            slopes, ...), the weights' names, shapes and dtypes, optimiser and scheduler with their hyperparameters,
            batch size, sampler, number of batches, ``seed``, ``clip_grad_norm``, ``binarize``, autocast, ``condition``,
            ``weight``, ``sample_weight``, ``schedule_by``, and the loaders' data where they are in memory: shapes and a
            hash of at most 16 MB of each tensor, in rows spread over it. Code cannot be seen (of ``forward``, of
            transforms), nor what is read from files. After a warning, hyperparameters given now replace the stored
            ones; a scheduler, and learning rates under it, go on as they were. Checkpoints of versions that did not
            keep this are taken as they are.
        progress: show a bar on a terminal if tqdm is installed; say in a line if the run was complete already.

    Returns:
        :class:`History`. The model keeps the mode (train or eval) it came with; training is in train mode.

    Raises:
        FloatingPointError: with epoch, step and the terms of the loss (of a fastvae model) or the gradients that are
            not finite; the checkpoints so far stay.
        ValueError: empty loader, losses not [B], arguments or a checkpoint that do not fit together.
        TypeError: samples in a tensor, a batch without images, a number that is none.
        FileNotFoundError, FileExistsError: by ``resume``.
        KeyboardInterrupt: after Ctrl-C; names the checkpoint.
        BlockingIOError: another run writes to ``run_dir``; says which process, on which host, since when.
        OSError: a checkpoint cannot be written, because the disk is full, say; names the file. The one before stays.
    """
    expect_numbers("fit", seed=seed, clip_grad_norm=clip_grad_norm)
    counts = {"epochs": epochs, "patience": patience, "max_steps": max_steps, "batch_size": batch_size}
    expect_integers("fit", 1, optional=True, **counts)
    expect_choice("fit", ("epoch", "step"), schedule_by=schedule_by)
    expect_choice("fit", ("raise", "skip"), on_nonfinite=on_nonfinite)
    expect_choice("fit", ("raise", "warn"), on_difference=on_difference)
    if not isinstance(model, nn.Module):
        raise TypeError(f"fit: model: expected a torch module, got {type(model).__name__}")
    batches = as_loader("loader", loader, batch_size)
    val_batches = as_loader("val_loader", val_loader, batch_size)
    if batch_size is not None and not any(isinstance(given, Dataset) for given in (loader, val_loader)):
        raise ValueError(
            f"fit: batch_size: expected a Dataset to make batches of, got {type(loader).__name__}, which has its own"
        )
    called = _checked_callbacks(callbacks, patience, val_batches)
    if device is not None:
        model.to(device)
    chosen_optimizer = _build_optimizer(model, optimizer)
    team = Team(model)
    scaler = _grad_scaler(model, grad_scaler, cuda_graph)
    places = {"condition": condition, "weight": weight, "sample_weight": sample_weight}
    run = Run(
        model=model,
        loader=batches,
        val_loader=val_batches,
        optimizer=chosen_optimizer,
        scheduler=build_scheduler("fit", chosen_optimizer, scheduler),
        run_dir=None if run_dir is None else Path(run_dir),
        interval=_interval(checkpoint_every),
        seed=int(seed),
        schedule_by=schedule_by,
        callbacks=called,
        keep_latest=keep_latest,
        on_nonfinite=on_nonfinite,
        on_difference=on_difference,
        options={
            "clip_grad_norm": clip_grad_norm,
            "binarize": binarize,
            "schedule_by": schedule_by,
            "autocast": _autocast(model),
            "grad_scaler": scaler is not None,
            **{name: "a function" if callable(place) else place for name, place in places.items()},
        },
        stepper=Stepper(
            model,
            chosen_optimizer,
            clip_grad_norm,
            binarize,
            team,
            restore=on_nonfinite == "skip",
            cuda_graph=cuda_graph,
            places=places,
            scaler=scaler,
        ),
        team=team,
    )
    # To hold a folder makes it; where there must be one, there is nothing to hold.
    needless = resume is True and run.run_dir is not None and not run.run_dir.is_dir()
    with run_folder_held(None if needless else run.run_dir, team):
        run.start(resume, epochs, max_steps)
        with modes_kept(model), global_generators_kept():
            model.train()
            run.train(epochs, max_steps, progress)
    return run.history


def _checked_callbacks(
    callbacks: Iterable[Callback], patience: int | None, val_loader: Any
) -> list[Callback]:
    if not isinstance(callbacks, Iterable):
        raise TypeError(
            "fit: callbacks: expected a list of fastvae.training.Callback objects, got "
            f"{type(callbacks).__name__} by itself"
        )
    found = list(callbacks)
    for callback in found:
        if not isinstance(callback, Callback):
            raise TypeError(
                f"fit: callbacks: expected fastvae.training.Callback objects, got {type(callback).__name__}"
            )
    if patience is not None:
        expect(val_loader is not None, "fit: patience: expected a val_loader to watch", "val_loader=None")
        found.append(EarlyStopping(patience))
    stopping = sum(isinstance(callback, EarlyStopping) for callback in found)
    expect(
        not stopping or val_loader is not None,
        "fit: callbacks: EarlyStopping: expected a val_loader to watch",
        "val_loader=None",
    )
    expect(stopping <= 1, "fit: callbacks: expected one EarlyStopping, or patience", "several")
    return found


def _autocast(model: nn.Module) -> str:
    device = next((parameter.device.type for parameter in model.parameters()), "cpu")
    return str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "off"


def _grad_scaler(
    model: nn.Module, given: torch.amp.GradScaler | str | None, cuda_graph: bool
) -> torch.amp.GradScaler | None:
    """The one to use; ValueError for what cannot be scaled."""
    if given == "auto":
        device = next(parameter.device.type for parameter in model.parameters())
        given = torch.amp.GradScaler(device) if _autocast(model) == "torch.float16" else None
    if given is None or (isinstance(given, torch.amp.GradScaler) and not given.is_enabled()):
        return None
    if not isinstance(given, torch.amp.GradScaler):
        raise TypeError(
            f'fit: grad_scaler: expected a torch.amp.GradScaler, "auto" or None, got {type(given).__name__}'
        )
    halves = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float16]
    wanted = "fit: grad_scaler: expected parameters in float32, of which autocast makes float16 by itself"
    expect(not halves, wanted, f"float16 in {', '.join(halves[:3])}")
    expect(
        not cuda_graph,
        "fit: cuda_graph: expected gradients without a scale, as in bfloat16",
        "autocast in float16, or a grad_scaler",
    )
    return given


def _interval(checkpoint_every: int | str | None) -> int | None:
    if checkpoint_every is None or checkpoint_every == "never":
        return None
    if checkpoint_every == "epoch":
        return 1
    if not isinstance(checkpoint_every, str):
        expect_numbers("fit", checkpoint_every=checkpoint_every)
    if is_integer(checkpoint_every) and checkpoint_every >= 1:
        return int(checkpoint_every)
    raise ValueError(
        f'fit: checkpoint_every: expected "epoch", "never" or an int of at least 1, got {checkpoint_every!r}'
    )


def _build_optimizer(
    model: nn.Module, optimizer: Optimizer | Callable[[list[nn.Parameter]], Optimizer] | None
) -> Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expect(bool(parameters), "fit: model: expected trainable parameters", "none")
    if optimizer is None:
        return torch.optim.Adam(parameters, lr=1e-3)
    if not (isinstance(optimizer, Optimizer) or callable(optimizer)):
        raise TypeError(
            "fit: optimizer: expected a torch.optim.Optimizer or what makes one of parameters, such as "
            f"torch.optim.Adam, got {type(optimizer).__name__}"
        )
    chosen = optimizer if isinstance(optimizer, Optimizer) else optimizer(parameters)
    if not isinstance(chosen, Optimizer):
        raise ValueError(f"fit: optimizer: expected a torch.optim.Optimizer, got {type(chosen).__name__}")
    expect(
        not {id(p) for p in parameters_of(chosen)}.isdisjoint(map(id, parameters)),
        "fit: optimizer: expected one of this model's parameters",
        "one that holds none of them",
    )
    return chosen


def build_scheduler(
    owner: str, optimizer: Optimizer, scheduler: LRScheduler | Callable[[Optimizer], LRScheduler] | None
) -> LRScheduler | None:
    """The scheduler of this optimiser, made if need be. ValueError, in the owner's name, for any other."""
    if scheduler is None:
        return None
    chosen = scheduler if isinstance(scheduler, LRScheduler) else scheduler(optimizer)
    if not isinstance(chosen, LRScheduler) or chosen.optimizer is not optimizer:
        raise ValueError(
            f"{owner}: scheduler: expected an LRScheduler of the optimizer that {owner} uses, or a callable from it, "
            f"got {type(chosen).__name__}"
        )
    return chosen
