"""Stage `tokenizer`: an image autoencoder with a discrete middle.

mmgen train --config tokenizer:quickstart --workdir runs/tokenizer
"""

import ml_collections

from mmgen.runtime.presets import LOOP, MESH, OPTIMIZER, SHARDING

VARIANTS = (
    "quickstart", "tiny", "world", "reference", "emoji", "photos", "emoji-f8", "photos-f8",
    "64px-1k", "256px-f16-16k", "256px-f16-64k", "256px-f8", "vq-16k", "lfq-18bit",
)  # fmt: skip


def get_config(variant):
    c = ml_collections.ConfigDict()
    c.stage = "tokenizer"
    c.seed = 0

    c.model = m = ml_collections.ConfigDict()
    m.patch = 4  # pixels a side of the patch that one code stands for
    m.quantizer = q = ml_collections.ConfigDict()  # see models/quantizers.py
    q.kind, q.depth = "fsq", 1  # or "vq", "lfq", "bsq"; over 1 of fsq and vq: residual
    q.levels = (3, 3, 5, 5, 5)  # of fsq: 1,125 codes
    q.codes, q.channels, q.decay, q.normalize, q.restart = 1024, 8, 0.99, True, 1.0  # of vq
    q.bits, q.diversity = 10, 1.0  # of lfq and bsq
    q.commitment, q.entropy = None, None  # of vq, lfq and bsq; None: what the kind's paper has
    m.alpha = False  # a fourth channel: how opaque
    m.frozen = False  # codes stay what they mean in the run of config.init, and the decoder learns alone
    # What a place sees of its surroundings: "patch" (nothing), "conv", "attention", or "cnn", a pyramid that begins
    # with pixels. An encoder that sees its patch alone gives codes that are far easier to foresee; the decoder makes
    # up for it.
    m.encoder, m.decoder = "patch", "conv"
    m.width = 64
    m.encoder_layers, m.layers = 2, 3  # of the encoder, and of the decoder
    m.cell_layers, m.cell_width = 3, 32  # of the decoder's last part, on cells of half a patch
    m.heads, m.kv_heads, m.head_dim, m.mlp, m.rope_base = 2, 2, 32, 128, 100.0  # of attention towers
    m.window = (
        0  # codes along each axis that a code of attention towers sees; 0: all. With it tiles are exact
    )
    m.channels, m.blocks = (32, 48, 64), 1  # of "cnn": widths from the finest scale on, blocks at each
    m.discriminator = dict(width=32, layers=2)
    m.dtype = "float32"
    m.unroll = True  # write the layers out instead of scanning them: faster on CPU

    c.data = d = ml_collections.ConfigDict()
    d.source = dict(
        spec="world:train", size=(32, 32), seed=0, documents=4_000, category="scene"
    )  # the busiest pictures teach most
    d.larger = {}  # another source beside it, whose pictures are larger: of them parts are cut out at random
    d.batch_size = 16
    d.max_bad = 0.1  # share of bad images above which the run gives up
    d.threads, d.workers = 1, 0  # that make batches ahead: threads or, if not 0, processes
    d.augment = False  # random resized crops, mirrored half of the time
    c.held_out = dict(spec="world:valid", size=(32, 32), seed=0, documents=256)

    # See stages/tokenizer.py: the weights of the terms, the error that is small enough, the share of codes that the
    # decoder must do without, and the share of images that are decoded in other colours, by the digits that are to
    # carry these. `perceptual` is by the image tower of the contrastive run in `towers`.
    c.loss = l = ml_collections.ConfigDict()
    l.weights = dict(
        log_mse=0.1, l1=0.0, l2=0.0, gradient=0.0, focal_frequency=0.0, ms_ssim=0.0, perceptual=0.0, adversarial=0.0,
        rate=0.004,
    )  # fmt: skip
    l.floor, l.noise, l.recolor, l.color_digits, l.towers = 1e-3, 0.05, 0.5, 2, ""
    l.gan = dict(kind="hinge", start=0, r1_weight=0.0, r1_every=16)  # of "adversarial"

    c.steps = 2600
    c.optimizer = ml_collections.ConfigDict(OPTIMIZER)
    c.optimizer.groups = dict(
        discriminator=dict(name="adamw", learning_rate=4e-4, beta1=0.5, beta2=0.99, clip=0.0)
    )
    c.ema = 0.0
    c.log_every, c.evaluate_every, c.save_every, c.keep = 250, 10_000, 2000, 2
    c.mesh, c.sharding = MESH, SHARDING
    c.update(LOOP)
    c.keep_pages = True  # on CPU a third faster for large models: see runtime/memory.py

    if variant == "world":  # rich scenes of 64 px, a code for 8 x 8 pixels: 125 colours times 512 outlines
        m.patch, q.levels, l.color_digits = 8, (5, 5, 5, 8, 8, 8), 3
        m.width, m.encoder_layers, m.layers, m.cell_layers, m.cell_width = 128, 3, 4, 3, 64
        d.source = dict(spec="world:train/draw+style", size=(64, 64), seed=0, documents=16_000)
        c.held_out = dict(spec="world:valid/draw+style", size=(64, 64), seed=0, documents=256)
        l.floor, l.noise, l.weights.rate = 2e-4, 0.02, 5e-4
        c.steps, c.save_every = 12_000, 1000
    if variant == "reference":  # of the released model: docs/reference.md
        # A code for 4 x 4 pixels, so that stripes and letters come back: 125 colours times 216 outlines
        q.levels, l.color_digits = (5, 5, 5, 6, 6, 6), 3
        m.width, m.encoder_layers, m.layers, m.cell_layers, m.cell_width = 96, 3, 4, 2, 32
        l.floor, l.noise, l.weights.rate = 2e-4, 0.02, 5e-4
        d.source = dict(spec="world:train/draw+style+sign", size=(64, 64), seed=0, documents=60_000)
        d.larger = dict(spec="world:train/poster+chart+diagram+comic", size=(128, 128), seed=0, documents=12_000)
        c.held_out = dict(spec="world:valid/draw+style+sign", size=(64, 64), seed=0, documents=256)
        c.steps, c.save_every = 6_000, 500
    folder = variant.removesuffix("-f8")
    if folder in ("emoji", "photos"):  # real pictures at 64 px, from img2dataset tars
        q.levels = (8, 5, 5, 5)
        m.encoder, m.width, m.layers, m.cell_layers = "conv", 96, 4, 0
        d.source = dict(
            spec=f"tars:data/{folder}/*.tar", size=(64, 64), seed=0, split="train", documents=None
        )
        d.source.split_by = "base" if folder == "emoji" else "key"
        d.source.background = (127, 127, 127)  # under emoji
        c.held_out = dict(d.source, split="test", documents=256)
        d.augment = folder == "photos"
        l.noise = l.weights.rate = l.recolor = 0.0
        c.steps, c.evaluate_every = 1500, 500
        # A quarter of the codes, of 30 bits each: for reconstruction, no transformer's vocabulary holds 2^30
        if variant != folder:
            m.patch, q.levels = 8, (4,) * 15
            m.width, m.encoder_layers, m.layers = 128, 4, 6
            d.batch_size, d.augment, c.steps, c.evaluate_every = 32, True, 5000, 1000
            if folder == "emoji":
                l.floor, c.steps = 2e-4, 4000
    if variant == "64px-1k":  # small pictures, small codebook: what papers compare quantizers with
        q.levels = (8, 5, 5, 5)
        m.patch, m.encoder, m.decoder, m.cell_layers = 8, "attention", "attention", 0
        m.width, m.encoder_layers, m.layers, m.heads, m.kv_heads, m.head_dim, m.mlp = 256, 4, 6, 8, 8, 32, 704
        d.source = dict(spec="tars:data/photos/*.tar", size=(64, 64), seed=0, split="train", documents=None)
        c.held_out = dict(d.source, split="test", documents=1000)
        d.batch_size, d.augment, d.workers = 64, True, 2
        l.noise = l.weights.rate = l.recolor = 0.0
        l.weights.l1, l.weights.ms_ssim = 0.1, 0.05
        c.steps, c.evaluate_every, c.save_every, c.ema = 50_000, 2500, 2500, 0.999
    if variant in ("256px-f16-16k", "256px-f16-64k", "256px-f8", "vq-16k", "lfq-18bit"):
        _large(c, variant)
    if variant == "tiny":  # for tests: seconds
        q.levels = (4, 2, 5, 5, 5)  # an even vocabulary, which two devices of a tensor axis can share
        m.cell_layers, m.cell_width = 1, 16
        m.width, m.encoder_layers, m.layers, m.heads, m.kv_heads, m.head_dim, m.mlp = 32, 1, 1, 2, 2, 16, 64
        d.source.documents, d.batch_size, c.held_out.documents = 64, 8, 16
        c.steps, c.log_every, c.save_every = 20, 10, 10
        c.optimizer.warmup = 2
    return c


def _large(c, variant):
    """256 px for accelerators: ViT towers for 256 codes an image, and a CNN pyramid for 1,024."""
    m, d, l, q = c.model, c.data, c.loss, c.model.quantizer
    m.patch, m.encoder, m.decoder, m.cell_layers = 16, "attention", "attention", 0
    m.unroll, m.dtype = False, "bfloat16"
    m.width, m.encoder_layers, m.layers, m.mlp = 768, 12, 12, 2048
    m.heads = m.kv_heads = 12
    m.head_dim = 64
    m.discriminator = dict(width=64, layers=3)
    q.levels = (8, 8, 8, 6, 5)  # 15,360 codes
    if variant == "256px-f16-64k":
        q.levels = (8, 8, 8, 5, 5, 5)
    if variant == "256px-f8":
        m.patch, m.encoder, m.decoder = 8, "cnn", "cnn"
        m.channels, m.blocks, m.width = (128, 128, 256, 256), 2, 512
    if variant == "vq-16k":
        q.kind, q.codes, q.channels = "vq", 16_384, 8
    if variant == "lfq-18bit":
        q.kind, q.bits = "lfq", 18
    d.source = dict(spec="tars:data/images/*.tar", size=(256, 256), seed=0, split="train", holdout=0.01)
    c.held_out = dict(d.source, split="test", documents=5000)
    d.batch_size, d.augment, d.workers = 256, True, 8
    l.noise = l.weights.rate = l.recolor = 0.0
    l.weights.log_mse, l.weights.l1, l.weights.l2, l.weights.gradient = 0.0, 0.2, 1.0, 0.1
    l.weights.adversarial, l.gan = 0.1, dict(kind="hinge", start=20_000, r1_weight=1e-4, r1_every=16)
    c.steps, c.evaluate_every = 400_000, 10_000
    c.log_every, c.save_every, c.keep = 100, 5000, 3
    c.optimizer.learning_rate, c.optimizer.adam_learning_rate, c.optimizer.warmup = 5e-3, 5e-4, 5000
    c.ema, c.spike, c.keep_every, c.keep_pages = 0.9999, 20.0, 50_000, False
    c.mesh.data, c.mesh.fsdp = 1, -1
