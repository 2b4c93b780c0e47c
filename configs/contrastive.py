"""Stage `contrastive`: an image tower and a text tower (CLIP, SigLIP).

mmgen text --source world:train --documents 5000 --languages en,zh --pieces 512 --out runs/both.model
mmgen train --config contrastive:world --workdir runs/towers --config.data.text=runs/both.model
"""

import ml_collections

from mmgen.runtime.presets import LOOP, MESH, OPTIMIZER, SHARDING

VARIANTS = ("world", "reference", "tiny", "emoji", "350m")


def get_config(variant):
    c = ml_collections.ConfigDict()
    c.stage = "contrastive"
    c.seed = 0

    c.model = m = ml_collections.ConfigDict()
    m.loss = "softmax"  # CLIP's, or "sigmoid": SigLIP's
    m.joint = 128  # width of the joint space
    m.max_scale = 100.0  # of the learned temperature: the greatest factor of a cosine
    m.dtype = "float32"  # of the computation; parameters are float32
    m.image = i = ml_collections.ConfigDict()
    i.patch = 4  # pixels a side
    i.width, i.layers, i.heads, i.kv_heads, i.head_dim, i.mlp = 128, 4, 4, 4, 32, 256
    i.rope_base = 100.0
    i.remat = "none"  # what the backward pass computes again: see models/layers.py: REMAT
    i.unroll = True  # write the layers out instead of scanning them: faster on CPU
    m.text = t = ml_collections.ConfigDict(dict(i))
    del t.patch
    t.layers, t.vocab_multiple = 3, 1  # rows of the table of pieces are rounded up to a multiple

    c.data = d = ml_collections.ConfigDict()
    d.source = dict(
        spec="world:train", size=(32, 32), seed=0, documents=60_000, languages=("en", "zh"), category="scene"
    )
    d.text = "runs/text.model"  # pieces of the captions: see `mmgen text`
    d.length = 48  # pieces of a caption; the rest is cut off
    d.phrasings = 4  # wordings of a caption to choose from, another each epoch
    d.altered = 0  # captions of each image with one attribute wrong, to tell apart as well; a world has them
    d.batch_size = 256  # pairs: each text is told apart from all other images of the batch
    d.max_bad = 0.1  # share of bad pairs above which the run gives up
    d.threads, d.workers = 1, 0  # that make batches ahead: threads or, if not 0, processes
    d.augment = False  # random resized crops, never mirrored
    c.held_out = dict(
        spec="world:valid", size=(32, 32), seed=0, documents=1000, languages=("en", "zh"), category="scene"
    )

    c.steps = 1500
    c.optimizer = OPTIMIZER | dict(adam_learning_rate=3e-3)
    c.ema = 0.0
    c.log_every, c.evaluate_every, c.save_every, c.keep = 50, 500, 500, 2
    c.mesh, c.sharding = MESH, SHARDING
    c.update(LOOP)
    c.keep_pages = True  # on CPU faster for large models: see runtime/memory.py

    if variant == "world":  # a caption with one attribute wrong beside each makes it learn shapes
        d.batch_size, d.altered, d.length = 128, 1, 40
        c.steps = 2000
    if variant == "reference":  # of the released model: docs/reference.md
        i.patch, d.batch_size, d.altered, d.length = 8, 128, 1, 48
        d.source.size = c.held_out.size = (64, 64)
        d.source.category = c.held_out.category = ""  # all: of scenes alone they tell single things badly
        c.steps = 2000
    if variant == "emoji":  # names of real pictures at 64 px, from img2dataset tars
        i.patch, d.length = 8, 24
        split = dict(size=(64, 64), seed=0, split_by="base")
        d.source = dict(spec="tars:data/emoji/*.tar", split="train", **split)
        c.held_out = dict(spec="tars:data/emoji/*.tar", split="test", **split)
        d.augment, d.batch_size = True, 128
        c.optimizer.weight_decay = 0.05
        c.steps, c.evaluate_every = 500, 100
    if variant == "tiny":  # for tests: seconds
        for tower in (i, t):
            tower.width, tower.layers, tower.heads, tower.kv_heads, tower.head_dim, tower.mlp = (
                32,
                2,
                2,
                2,
                16,
                64,
            )
        i.patch, m.joint = 8, 16
        d.batch_size, d.source.documents, c.held_out.documents = 16, 200, 50
        c.steps, c.log_every, c.evaluate_every, c.save_every = 20, 10, 20, 10
        c.optimizer.warmup = 2
    if variant == "350m":  # ViT-L/16 and a text tower of BERT-base's size: about 350M parameters, 256 px
        i.patch = 16
        i.width, i.layers, i.heads, i.kv_heads, i.head_dim, i.mlp = 1024, 20, 16, 16, 64, 2816
        t.width, t.layers, t.heads, t.kv_heads, t.head_dim, t.mlp = 768, 12, 12, 12, 64, 2048
        m.loss, m.joint, m.dtype = "sigmoid", 768, "bfloat16"
        t.vocab_multiple = 256
        for tower in (i, t):
            tower.remat, tower.unroll = "attention", False
        t.rope_base = 10_000.0
        d.batch_size, d.augment, d.phrasings, d.workers = 16_384, True, 1, 8
        d.source = dict(spec="tars:data/pairs/*.tar", size=(256, 256), seed=0, split="train", holdout=0.001)
        c.held_out = dict(d.source, split="test", documents=5_000)
        c.steps, c.optimizer.warmup, c.optimizer.weight_decay = 100_000, 2_000, 0.1
        c.optimizer.learning_rate, c.optimizer.adam_learning_rate = 5e-3, 5e-4
        c.ema = 0.9999
        c.log_every, c.evaluate_every, c.save_every, c.keep = 100, 5_000, 2_000, 3
        c.spike, c.keep_every, c.keep_pages = 20.0, 10_000, False
        c.mesh.data, c.mesh.fsdp = 1, -1
    return c
