"""The one training loop: every stage is run by `train(config, workdir)`.

A stage (one file beside this one) is a function `setup(config, workdir) -> Stage` that says what
is learned and from what; everything about meshes, optimizers, checkpoints, resuming and logging
is here, once, in the order in which it happens. What is compiled is in program.py.
"""

import contextlib
import fcntl
import importlib
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from tqdm import tqdm

from mmgen.runtime import checkpoint, hardware, memory
from mmgen.runtime import mesh as meshes
from mmgen.runtime import metrics as metric_files
from mmgen.runtime.config import ConfigError, nearest
from mmgen.runtime.goodput import Goodput
from mmgen.runtime.preemption import Preempted, Preemption
from mmgen.runtime.watchdog import Watchdog
from mmgen.stages import program as programs

STAGES = ("tokenizer", "contrastive", "classifier", "transformer", "reinforce", "refiner")

# Settings that may differ between the runs that continue one another: they steer what is
# written down and where it is computed, never what is learned.
_FREE = {
    "log_every",
    "save_every",
    "evaluate_every",
    "keep",
    "keep_every",
    "best",
    "name",
    "prefetch",
    "mesh",
    "sharding",
    "keep_pages",
    "step_limit",
    "max_skipped",
    "profile",
    "wandb",
    "init",  # where the first weights came from: read once, they may be gone
    "remat",  # of any model or tower, as are the next two
    "unroll",
    "attention",
    "loss.chunk",
    "loss.towers",  # where they lie; the stage compares their weights
    "data.threads",
    "data.workers",
    "data.max_bad",
    "data.tokenizer",  # where it lies
    "refine_steps",
    "sampling",
    "data.shards",  # where they lie; the stage compares what they hold
    "held_out.shards",
    "held_out.batches",
    "data.text",
}


class Stage(NamedTuple):
    """What a stage adds to the loop."""

    make: Callable[[nnx.Rngs], nnx.Module]
    loss: Callable[
        [nnx.Module, dict, jax.Array], dict
    ]  # (model, batch, key) -> {name: (sum, weight)}, with "loss"
    data: Any  # .prefetch(start, rows) -> iterator of (step, those rows of the batch, how many are bad)
    shape: tuple[int, ...]  # of a batch: rows, or rows and tokens a row
    axes: tuple[str, ...]  # their logical axes
    unit: str  # what throughput counts, e.g. "tokens"
    units_a_step: int
    evaluate: Callable[[nnx.GraphDef, dict, int], dict]  # held-out metrics; may write previews
    adopt: Callable[[], None] = lambda: None  # puts into the workdir what samples of the run need
    identity: dict = {}  # what the data means (hashes of tokenizer, grammar, text): a run goes on with the same alone
    flops: Callable[[dict], float] = lambda params: 0.0  # of a step, from the parameters' shapes, for MFU
    grow: Callable[[Path], dict] = lambda workdir: {}  # how the rows of another run's tables lie in ours
    only: Callable[[Path], str | None] = lambda workdir: None  # the pattern of what is taken from another run
    warnings: Callable[[dict], list[str]] = lambda measured: []  # what is wrong with a step, by its metrics
    complete: str = ""  # the pattern of parameters that config.init must give, all of them
    # (Program, params, step, rows of the data, share) -> these rows of a batch, made with the weights of the step;
    # share(rows of a batch) is the batch as global arrays
    rollout: Callable | None = None
    close: Callable[[], None] = lambda: None  # at the end of a run, however it ends


def setup(config, workdir):
    """The `Stage` of config.stage."""
    if config.stage not in STAGES:
        raise ConfigError(f"no stage {config.stage!r}; {nearest(config.stage, STAGES)}")
    return importlib.import_module(f"mmgen.stages.{config.stage}").setup(config, Path(workdir))


def train(config, workdir, *, stop_at=None):
    """Trains from scratch or from the newest good checkpoint of `workdir`; returns the last metrics.

    The same command run again continues, and (on CPU) ends with the same bits as a run that was
    never stopped. `stop_at` ends early, after saving, as an interruption would. SIGTERM and SIGUSR1
    are such interruptions: the run saves and raises `Preempted`, which ends a process with status 75.
    """
    workdir, began = Path(workdir), time.monotonic()
    with contextlib.ExitStack() as within:
        preemption = within.enter_context(Preemption())  # from here on a signal loses nothing
        _check(config, workdir)
        if config.keep_pages:
            memory.keep_pages()
        stage = setup(config, workdir)
        within.callback(stage.close)
        mesh = meshes.make_mesh(dict(config.mesh))
        layout = NamedSharding(mesh, meshes.spec(stage.axes, config.sharding))
        updates = config.get("updates", 1)
        meshes.check_batch(layout, stage.shape, config.accumulate)
        if updates > 1:  # each with its part of the rows
            meshes.check_batch(layout, (stage.shape[0] // updates, *stage.shape[1:]), config.accumulate)
        rows = NamedSharding(mesh, meshes.spec(stage.axes[:1], config.sharding))
        mine = meshes.local_rows(rows, stage.shape[0])
        within.enter_context(meshes.use(mesh, config.sharding))

        # -- state: shapes first, then shardings, then values, never all on one device
        program = programs.build(config, stage.make, stage.loss, mesh)
        options = dict(keep=config.keep, keep_every=config.keep_every, **_best(config.best))
        first = jax.process_index() == 0  # of the processes that share a workdir, the one that writes
        if first:  # after all that may refuse the config: a mistake does not claim the workdir
            within.enter_context(_claimed(workdir))
            stage.adopt()
            _record(config, workdir)
        saves = within.enter_context(checkpoint.Checkpoints(workdir, **options))
        start, pending = saves.latest(), None
        if start is None:
            start, state = 0, program.init(jax.random.key(config.seed))
            if config.init:
                state = _initial(state, stage, config)
        else:
            record = checkpoint.manifest(workdir, start)["record"]
            pending = record.get("pending")
            changed = checkpoint.diff(record.get("identity", stage.identity), stage.identity)
            if changed:
                raise checkpoint.CheckpointError(
                    f"{workdir} learned from other data than these:\n" + "\n".join(changed)
                )
            state = checkpoint.restore(workdir, start, program.shapes)
        saved = start
        goodput = Goodput(workdir, start, began, write=first)
        sizes = jax.tree.map(lambda s: s.size, program.shapes["params"])
        count, flops = sum(jax.tree.leaves(sizes)), stage.flops(program.shapes["params"])
        peak = hardware.peak_flops(jax.devices()[0], str(config.model.dtype))
        print(
            f"{config.name}: {count / 1e6:.2f}M parameters, {meshes.describe(mesh)}, "
            f"steps {start} -> {config.steps}, workdir {workdir}",
            flush=True,
        )

        # -- the loop
        stop = min(config.steps, stop_at or config.steps)
        writer = metric_files.Metrics(workdir, start, project=config.wandb) if first else None
        last = {}
        if start >= stop:  # nothing left to do: report what was measured when it was done
            for line in metric_files.read(workdir):
                last |= {name: value for name, value in line.items() if name != "step"}
        record = {"config": json.loads(config.to_json()), "identity": stage.identity}
        record |= {"versions": metric_files.environment()["versions"]}

        def save(step, metrics=None, **more):
            with goodput.on("save"), watchdog.patient():
                saves.save(step, state, record | more, metrics)

        watchdog = Watchdog(config.step_limit)
        within.callback(watchdog.rest)

        def evaluate(step):
            """The stage's measurements, or None where a signal came meanwhile."""
            with goodput.on("evaluate"), watchdog.patient():
                params = state.get("ema", state["params"])
                return preemption.attempt(lambda: stage.evaluate(program.graphdef, params, step))

        if pending and not any(line["step"] == start for line in metric_files.read(workdir)):
            found = evaluate(start)  # the run was stopped while it measured this step
            if found is not None and first:
                writer.write(start, pending | found)
            last = pending | (found or {})
        profile = within.enter_context(metric_files.Profile(workdir, *config.profile, on=first))
        batches = within.enter_context(contextlib.closing(stage.data.prefetch(start, mine)))
        bar = tqdm(
            total=config.steps, initial=start, desc=config.name, disable=None if first else True, leave=False
        )
        share = lambda batch: meshes.global_batch(batch, mine, stage.shape[0], layout)
        began, since, waited, bad, preempted, in_row = time.monotonic(), start, 0.0, 0, False, None
        reached, rolled = start, 0.0
        watchdog.arm(watchdog.allowance)  # until the first step is compiled and done
        for step in range(start, stop):
            batch = None
            if not preemption.reached(step):
                wait = time.monotonic()
                with goodput.on("data"):
                    got = preemption.attempt(lambda: next(batches))
                if got is not None:
                    index, batch, skipped = got
                    assert index == step, (index, step)
                waited += time.monotonic() - wait
            if batch is not None and stage.rollout:
                jax.block_until_ready(state["params"])  # so that the step before does not count as drawing
                wait = time.monotonic()
                made = lambda: stage.rollout(program, state["params"], step, batch, share)
                batch = preemption.attempt(made)
                rolled += time.monotonic() - wait
            if batch is None:  # a signal came before the step or while it waited for data
                preempted = True
                if saved < step:
                    save(step)
                break
            bad += skipped
            profile.at(step)
            state, measured = program.step(state, share(batch))
            if step == start:  # compiling is no step: neither the watchdog nor throughput counts it
                jax.block_until_ready(measured)
                goodput.running()
                began, since, waited, rolled = time.monotonic(), start + 1, 0.0, 0.0
            watchdog.arm()
            bar.update()
            reached = done = step + 1
            # The step before is looked at while this one is computed, so that nothing waits; but for the one
            # that may be one skipped step too many.
            if in_row is None or int(in_row) >= config.max_skipped - 1:
                jax.block_until_ready(measured)
                if int(measured["skipped_in_row"]) >= config.max_skipped:
                    save(done)
                    saves.wait()
                    _give_up(workdir, done, mine, batch, measured)
            in_row = measured["skipped_in_row"]
            log, to_save = done % config.log_every == 0, done % config.save_every == 0 or done == stop
            measure = done % config.evaluate_every == 0 or done == config.steps
            if log or measure:
                # Reading the metrics of this step waits for it; between such steps nothing waits.
                last = {name: float(value) for name, value in measured.items()}
                steps, seconds = done - since, time.monotonic() - began
                last["goodput"] = goodput.share(done)
                if steps:  # beside the first of this process, which was compiled
                    rate = steps / seconds
                    last |= {
                        f"{stage.unit}_per_second": rate * stage.units_a_step,
                        "data_wait": waited / steps,
                    }
                    if rolled:
                        units = steps * stage.units_a_step
                        last[f"rollout_{stage.unit}_per_second"] = units / rolled
                        last[f"update_{stage.unit}_per_second"] = units / (seconds - rolled - waited)
                    if flops:
                        last["tflops_per_device"] = flops * rate / mesh.size / 1e12
                    if flops and peak:
                        last["mfu"] = flops * rate / mesh.size / peak
                if saves.failed:
                    last["failed_saves"] = saves.failed
                if bad:  # documents that could not be read, since the run began or went on
                    last["bad_documents"] = bad
                shown = "  ".join(f"{name} {value:.4g}" for name, value in last.items())
                eta = f"eta {(config.steps - done) * seconds / steps:.0f} s" if steps else ""
                if first:
                    wrong = "".join(f"  WARNING: {text}" for text in stage.warnings(last))
                    tqdm.write(f"step {done}/{config.steps}  {shown}  {eta}{wrong}")
                    sys.stdout.flush()  # through a pipe it would come hundreds of steps later
                if measure:
                    found = evaluate(done)
                    if found is None:  # a signal came: it is measured when the run goes on
                        preempted = True
                        save(done, pending=last)
                        break
                    last |= found
                if first:
                    writer.write(done, last)
                began, since, waited, rolled = time.monotonic(), done, 0.0, 0.0
            if to_save:  # last: what is on disk of a saved step is whole, and resuming cuts back the rest
                save(done, last if log or measure else None)
                saved = done
        bar.close()
        with goodput.on("save"), watchdog.patient():
            if not saves.wait():  # the last one is what all was for: once more
                saves.save(reached, state, record, None)
                if not saves.wait():
                    raise checkpoint.CheckpointError(
                        f"step {reached} could not be saved: {saves.error}. The last that counts is "
                        f"{checkpoint.latest(workdir)}; make room, and run again"
                    )
        watchdog.rest()
        goodput.share(reached)
        if first:
            writer.close()
        if preempted:
            raise Preempted(reached)
    return last


def _check(config, workdir):
    """Makes `workdir`, or checks that the run in it has this config's settings."""
    if not 0 <= config.seed < 1 << 32:
        raise ConfigError(f"config.seed is a whole number from 0 to 2**32 - 1, not {config.seed}")
    for name in ("log_every", "save_every", "evaluate_every", "keep", "max_skipped", "accumulate"):
        if config[name] < 1:
            raise ConfigError(f"config.{name} is at least 1, not {config[name]}")
    if len(config.profile) != 2:
        raise ConfigError(f"config.profile is (first step, the one after the last), not {config.profile}")
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "config.json"
    ours = json.loads(config.to_json())
    if path.exists():
        theirs = json.loads(path.read_text())
        before, now = checkpoint.named_leaves(theirs), checkpoint.named_leaves(ours)
        changed = sorted(
            key
            for key, value in now.items()
            if before.get(key, value) != value and not {key, key.split(".")[0], key.split(".")[-1]} & _FREE
        )
        if theirs.get("stage") != ours["stage"]:
            raise ConfigError(
                f"{workdir} holds a {theirs.get('stage')} run, this config is a "
                f"{ours['stage']} run; use another --workdir"
            )
        if changed and checkpoint.latest(workdir) is not None:  # without one nothing is learned yet
            raise ConfigError(
                f"{workdir} holds a run with other settings ({', '.join(changed)} differ); "
                "use another --workdir, or the settings in its config.json"
            )


@contextlib.contextmanager
def _claimed(workdir):
    """Holds the workdir against other runs: two that write one folder would set each other's checkpoints aside."""
    with open(workdir / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another run trains in {workdir} now; stop it, or use another --workdir"
            ) from None
        except OSError as error:  # some network file systems have no locks
            logging.warning("%s cannot be locked (%s): see that no other run trains there", workdir, error)
        yield


def _record(config, workdir):
    """Writes the resolved config, and where the run takes place, to `workdir`."""
    path = workdir / "config.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(config.to_json(indent=2))
    os.replace(temporary, path)
    (workdir / "environment.json").write_text(json.dumps(metric_files.environment(), indent=2))


def _best(text):
    """config.best, "NAME:min" or "NAME:max" or "", as arguments of `Checkpoints`."""
    if not text:
        return {}
    name, _, mode = text.partition(":")
    if not name or mode not in ("min", "max"):
        raise ConfigError(f"config.best is written NAME:min or NAME:max, as in psnr:max; found {text!r}")
    return {"best": name, "mode": mode}


def _initial(state, stage, config):
    """The state with the weights of the run in config.init, as far as they fit; says what was taken."""
    source = Path(config.init)
    params, report = checkpoint.restore_weights(
        source, state["params"], grow=stage.grow(source), only=stage.only(source)
    )
    missing = [name for name in report["left"] if stage.complete and re.search(stage.complete, name)]
    if missing:
        raise ConfigError(
            f"config.init={config.init}: expected a run that has all that is taken from it; it has no {', '.join(missing)}"
        )
    counts = ", ".join(f"{len(names)} {what}" for what, names in report.items())
    print(
        f"weights from {source}: {counts}; left as initialised: {', '.join(report['left']) or 'none'}",
        flush=True,
    )
    return (
        state | {"params": params} | ({"ema": jax.tree.map(jax.numpy.copy, params)} if "ema" in state else {})
    )


def _give_up(workdir, done, rows, batch, measured):
    """Writes down what is needed to see again why the last steps were skipped, and raises FloatingPointError.

    The state is the checkpoint of step `done`: skipped steps leave it as it was. The batch is this process's `rows`.
    """
    measured = {name: float(value) for name, value in measured.items()}
    folder = Path(workdir) / "bundles" / f"{done}-{jax.process_index()}"
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "batch.npz", rows=rows, **batch)
    (folder / "measured.json").write_text(json.dumps(measured, indent=2))
    raise FloatingPointError(
        f"{measured['skipped_in_row']:.0f} steps in a row were skipped, the last is {done}: loss {measured['loss']}, "
        f"gradient norm {measured['grad_norm']}. Checkpoint {done} is from before them; its batch is in {folder}. "
        "Look with `mmgen tools replay`, try a lower learning rate or a larger config.spike"
    )
