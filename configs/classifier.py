"""Stage `classifier`: labels of images, by heads on an image tower.

mmgen train --config classifier:world --workdir runs/classifier
mmgen train --config classifier:safety --workdir runs/safety
mmgen train --config classifier:world --workdir runs/probe --config.model.frozen=true --config.init=runs/towers
"""

import ml_collections

from mmgen.runtime import config as configs
from mmgen.runtime.presets import LOOP, MESH, OPTIMIZER, SHARDING
from mmgen.world.scene import BACKGROUNDS, COLORS, SHAPES

VARIANTS = ("world", "scene", "safety", "tiny", "350m")


def get_config(variant):
    c = ml_collections.ConfigDict()
    c.stage = "classifier"
    c.seed = 0

    c.model = m = ml_collections.ConfigDict()
    towers = configs.load(f"contrastive:{variant if variant in ('tiny', '350m') else 'world'}").model
    m.image, m.dtype = towers.image, towers.dtype
    m.frozen = False  # learn the head alone, on the tower of config.init

    # What is learned: the field of the source, its values, and whether several are true at once.
    c.labels = dict(
        shape=dict(field="shapes", classes=SHAPES, multi=False),
        color=dict(field="colors", classes=tuple(COLORS), multi=False),
        background=dict(field="background", classes=tuple(BACKGROUNDS), multi=False),
    )
    c.false_alarms = 0.01  # share of images without a label that may be given it, which sets its threshold

    c.data = d = ml_collections.ConfigDict()
    # A source, and with `larger` another, whose pictures are made as small as its own
    d.source = dict(spec="world:train", size=(32, 32), seed=0, documents=20_000, category="colors")
    d.batch_size = 64
    d.max_bad = 0.1  # share of bad images above which the run gives up
    d.threads, d.workers = 1, 0  # that make batches ahead: threads or, if not 0, processes
    d.augment, d.flip = False, False  # random resized crops; mirrored half of the time
    c.held_out = dict(spec="world:valid", size=(32, 32), seed=0, documents=4000, category="colors")

    c.steps = 1000
    c.optimizer = OPTIMIZER | dict(adam_learning_rate=3e-3)
    c.ema = 0.0
    c.log_every, c.evaluate_every, c.save_every, c.keep = 50, 1000, 500, 2
    c.mesh, c.sharding = MESH, SHARDING
    c.update(LOOP)
    c.keep_pages = True  # on CPU faster for large models: see runtime/memory.py

    if variant == "scene":  # several things in a picture: which shapes and colours are there
        c.labels.shape.multi = c.labels.color.multi = True
        d.source.category = c.held_out.category = "scene"
        c.steps = c.evaluate_every = 2000
    if variant == "safety":  # people and stand-in symbols in pictures of the world: see docs/safety.md
        c.labels = dict(
            person=dict(field="person", classes=("none", "adult", "child"), multi=False),
            symbol=dict(field="symbol", classes=("no", "yes"), multi=False),
        )
        m.image.patch = 8
        pages = dict(spec="world:train/sign+poster+chart+diagram+comic", size=(128, 128), seed=0, documents=16_000)
        d.source = dict(spec="world:train/guarded+guarded+guarded+draw", size=(64, 64), seed=0, documents=48_000, larger=pages)
        pages = dict(pages, spec=pages["spec"].replace("train", "valid"), documents=1000)
        c.held_out = dict(d.source, spec=d.source["spec"].replace("train", "valid"), documents=4000, larger=pages)
        c.steps = c.evaluate_every = 3500
        c.false_alarms = 0.005
    if variant == "tiny":  # for tests: seconds
        d.source.larger = dict(d.source, size=(48, 48), documents=40)
        d.source.documents, d.batch_size, c.held_out.documents = 200, 16, 60
        c.steps, c.log_every, c.evaluate_every, c.save_every = 20, 10, 20, 10
        c.optimizer.warmup = 2
    if variant == "350m":  # a head on the contrastive tower of that size, for labelled tars
        m.frozen = True
        c.labels = dict(label=dict(field="label", classes=("no", "yes"), multi=False))
        d.source = dict(spec="tars:data/labelled/*.tar", size=(256, 256), seed=0, split="train")
        c.held_out = dict(d.source, split="test")
        d.batch_size, d.augment, d.flip, d.workers = 1024, True, True, 8
        c.steps, c.evaluate_every, c.save_every = 5_000, 1_000, 1_000
        c.optimizer.adam_learning_rate = 1e-3
        c.keep_pages = False
        c.mesh.data, c.mesh.fsdp = 1, -1
    return c
