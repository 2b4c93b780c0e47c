"""Stage `tokenizer`: an image autoencoder with a discrete middle.

mmgen train --config tokenizer:quickstart --workdir runs/tokenizer
"""

import ml_collections

from mmgen.runtime.presets import LOOP, MESH, OPTIMIZER, SHARDING

VARIANTS = ("quickstart", "tiny", "emoji", "photos")


def get_config(variant):
    c = ml_collections.ConfigDict()
    c.stage = "tokenizer"
    c.seed = 0

    c.model = m = ml_collections.ConfigDict()
    m.patch = 4  # pixels a side of the patch that one code stands for
    m.levels = (3, 3, 5, 5, 5)  # FSQ levels: 1,125 codes
    # What a place sees of its surroundings: "patch" (nothing), "conv" or "attention". An encoder that sees
    # its patch alone gives codes that are far easier to foresee; the decoder makes up for it.
    m.encoder, m.decoder = "patch", "conv"
    m.width = 64
    m.encoder_layers, m.layers = 2, 3  # of the encoder, and of the decoder
    m.cell_layers, m.cell_width = 3, 32  # of the decoder's last part, on cells of half a patch
    m.heads, m.kv_heads, m.head_dim, m.mlp, m.rope_base = 2, 2, 32, 128, 100.0  # of attention towers
    m.dtype = "float32"
    m.unroll = True  # write the layers out instead of scanning them: faster on CPU

    c.data = d = ml_collections.ConfigDict()
    d.source = dict(
        spec="world:train", size=(32, 32), seed=0, documents=4_000, category="scene"
    )  # the busiest pictures teach most
    d.batch_size = 16
    d.max_bad = 0.1  # share of bad images above which the run gives up
    d.threads, d.workers = 1, 0  # that make batches ahead: threads or, if not 0, processes
    d.augment = False  # random resized crops, mirrored half of the time
    c.held_out = dict(spec="world:valid", size=(32, 32), seed=0, documents=256)

    # See stages/tokenizer.py: the error that is small enough, the share of codes that the decoder must do
    # without, the weight of how hard the codes are to foresee, and the share of images that are decoded in
    # other colours, by the digits that are to carry these. `perceptual` weighs how unlike pictures look to the
    # image tower of the contrastive run in `towers`.
    c.loss = dict(floor=1e-3, noise=0.05, rate=0.004, recolor=0.5, color_digits=2, perceptual=0.0, towers="")

    c.steps = 2600
    c.optimizer = OPTIMIZER
    c.ema = 0.0
    c.log_every, c.evaluate_every, c.save_every, c.keep = 250, 10_000, 2000, 2
    c.mesh, c.sharding = MESH, SHARDING
    c.update(LOOP)
    c.keep_pages = True  # on CPU a third faster for large models: see runtime/memory.py

    if variant in ("emoji", "photos"):  # real pictures at 64 px, from img2dataset tars
        m.levels = (8, 5, 5, 5)
        m.encoder, m.width, m.layers, m.cell_layers = "conv", 96, 4, 0
        split = dict(size=(64, 64), seed=0, split_by="base" if variant == "emoji" else "key")
        d.source = dict(spec=f"tars:data/{variant}/*.tar", split="train", **split)
        c.held_out = dict(spec=f"tars:data/{variant}/*.tar", split="test", documents=256, **split)
        d.augment = variant == "photos"
        c.loss.noise = c.loss.rate = c.loss.recolor = 0.0
        c.steps, c.evaluate_every = 1500, 500
    if variant == "tiny":  # for tests: seconds
        m.levels = (4, 2, 5, 5, 5)  # an even vocabulary, which two devices of a tensor axis can share
        m.cell_layers, m.cell_width = 1, 16
        m.width, m.encoder_layers, m.layers, m.heads, m.kv_heads, m.head_dim, m.mlp = 32, 1, 1, 2, 2, 16, 64
        d.source.documents, d.batch_size, c.held_out.documents = 64, 8, 16
        c.steps, c.log_every, c.save_every = 20, 10, 10
        c.optimizer.warmup = 2
    return c
