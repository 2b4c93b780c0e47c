"""Stage `transformer`: next token over text and image codes.

  mmgen train --config transformer:quickstart --workdir runs/transformer \
      --config.data.shards=runs/shards
"""

import ml_collections

from mmgen.runtime.presets import LOOP, MESH, OPTIMIZER, SHARDING

VARIANTS = ("quickstart", "tiny", "preview", "preview-2", "preview-3", "reference", "reference-2", "reference-3", "reference-4", "reference-5", "reference-6", "emoji", "dialogue", "350m", "1b", "7b")


def get_config(variant):
    c = ml_collections.ConfigDict()
    c.stage = "transformer"
    c.seed = 0

    c.model = m = ml_collections.ConfigDict()
    m.width, m.layers = 128, 3
    m.heads, m.kv_heads, m.head_dim, m.mlp = 4, 4, 32, 384
    m.rope_base = 20.0  # grids and captions are small; larger for long rows
    m.tied = False  # one table for reading and writing tokens
    m.factored = True  # codes share what is learned of their FSQ digits
    m.around = True  # give each place the codes around it at the input, where they are factored
    m.vocab_multiple = 1  # round the tables' rows up to a multiple, which a tensor axis can share
    m.before = 3  # tokens before each one that are mixed into it at the input; 0 for none
    # Tell a code in two steps, its colour and then its outline, by a hidden layer of so many units; 0: at once. Large
    # codebooks are then as cheap as small ones
    m.outline = 0
    # Give each place the codes that so many images before have there, and beside: where images are changed or compared
    m.beneath = 0
    # What tokens know of the images before them: their "codes", by "cross"-attention to features of a ViT over
    # these, or "both"; one such attention before so many layers (docs/context.md)
    m.context, m.cross_every = "codes", 1
    m.encoder = dict(width=128, layers=2, heads=4, kv_heads=4, head_dim=32, mlp=384)
    m.dtype = "float32"  # of the computation; parameters are float32
    m.remat = "none"  # what the backward pass computes again instead of keeping: see models/layers.py: REMAT
    m.attention = "auto"  # or "xla", "splash" (TPU), "gpu": see models/attention.py
    m.unroll = True  # write the layers out instead of scanning them: faster on CPU

    c.data = d = ml_collections.ConfigDict()
    d.shards = "runs/shards"  # a folder written by `mmgen tokenize`, or several: "a,b"
    d.mixture = ()  # shares of tokens, (("world", 0.7), ("photos", 0.3)), by the names of the sources; (): as they come
    d.batch_size = 7  # rows
    d.row_length = 176  # tokens a row; several documents share one
    d.overlong = "error"  # or "drop": what to do with documents longer than a row
    d.text_drop = 0.1  # share of documents trained without their text (for guidance)
    d.image_drop = 0.0  # ... without text and without the images of their user turns
    d.max_bad = 0.01  # share of damaged documents above which the run gives up
    d.threads, d.workers = 1, 0  # that make batches ahead: threads or, if not 0, processes
    d.text_weight, d.image_weight = 1.0, 1.0
    d.user_weight, d.user_images = False, True  # learn what the user says too; and with that, shows

    # A folder of shards, or several, of what training does not see: its loss is measured every `evaluate_every` steps, on so
    # many batches; "": none
    c.held_out = dict(shards="", batches=16)

    # Weight of log Z squared; and how many tokens a device turns into logits at a time (0: all)
    c.loss = dict(z=1e-4, chunk=0)

    c.sampling = dict(temperature=0.1)  # of pictures, where who asks for one says nothing of it
    c.steps = 8200
    c.optimizer = OPTIMIZER | dict(adam_learning_rate=6e-3, beta2=0.98)
    c.ema = 0.0
    c.log_every, c.evaluate_every, c.save_every, c.keep = 100, 10_000, 500, 2
    c.mesh, c.sharding = MESH, SHARDING
    c.update(LOOP)
    c.keep_pages = True  # on CPU a third faster: see runtime/memory.py

    if variant == "emoji":  # names -> 64 px pictures of 16 x 16 codes
        m.layers = 6
        d.batch_size, d.row_length, d.overlong = 16, 288, "drop"
        c.steps, c.optimizer.weight_decay = 1_000, 0.01
    if variant.startswith("preview"):  # all tasks of the world, in three parts: launch/preview.sh, docs/preview.md
        m.layers, m.outline, m.beneath = 4, 128, 2
        d.mixture = (
            ("plain", 0.22), ("refusal", 0.03), ("draw", 0.12), ("edit", 0.19), ("style", 0.10), ("ask", 0.06), ("caption", 0.05),
            ("detail", 0.02), ("compare", 0.02), ("mix", 0.02), ("reason", 0.02), ("dialogue", 0.06),
            ("story", 0.01), ("prose", 0.01), ("sign", 0.03), ("page", 0.04),
        )  # fmt: skip
        d.batch_size, d.row_length, d.overlong = 3, 640, "drop"
        d.image_drop = 0.05  # edits are guided by their images too
        c.steps, c.ema = 18_000, 0.999
    if variant in ("preview-2", "preview-3"):  # the run of the part before (config.init) goes on
        d.mixture = (
            ("plain", 0.22), ("refusal", 0.03), ("draw", 0.08), ("edit", 0.24), ("style", 0.05), ("ask", 0.10), ("caption", 0.08),
            ("detail", 0.02), ("compare", 0.03), ("mix", 0.02), ("reason", 0.02), ("dialogue", 0.05),
            ("story", 0.005), ("prose", 0.005), ("sign", 0.02), ("page", 0.03),
        )  # fmt: skip
        d.text_weight = 2.0
        c.steps, c.optimizer.learning_rate, c.optimizer.adam_learning_rate = 20_000, 1.5e-2, 4.5e-3
    if variant == "preview-3":  # which thing is meant: "remove the circle" says what there is, as captions do
        d.mixture = (
            ("plain", 0.17), ("refusal", 0.02), ("draw", 0.06), ("edit", 0.28), ("style", 0.04), ("ask", 0.09), ("caption", 0.08),
            ("detail", 0.10), ("compare", 0.03), ("mix", 0.02), ("reason", 0.02), ("dialogue", 0.04),
            ("story", 0.005), ("prose", 0.005), ("sign", 0.02), ("page", 0.02),
        )  # fmt: skip
        d.user_weight, d.user_images = True, False
    if variant.startswith("reference"):  # of the released model, on a GPU: launch/reference.sh, docs/reference.md
        m.width, m.layers, m.heads, m.kv_heads, m.head_dim, m.mlp = 320, 8, 5, 5, 64, 896
        m.outline, m.beneath, m.dtype, m.unroll = 256, 2, "bfloat16", False
        d.mixture = (
            ("plain", 0.13), ("draw", 0.08), ("refusal", 0.03), ("edit", 0.23), ("style", 0.05), ("ask", 0.05), ("caption", 0.04),
            ("detail", 0.05), ("compare", 0.02), ("mix", 0.015), ("reason", 0.02), ("dialogue", 0.07), ("story", 0.005),
            ("prose", 0.005), ("sign", 0.06), ("poster", 0.03), ("chart", 0.04), ("diagram", 0.035), ("comic", 0.04),
        )  # fmt: skip
        d.batch_size, d.row_length, d.overlong, d.threads = 24, 1280, "drop", 3
        d.image_drop, d.text_weight, d.user_weight, d.user_images = 0.05, 2.0, True, False
        c.sampling.temperature = 0.3  # at 0.1 white grounds stay empty
        c.steps, c.ema, c.log_every, c.save_every = 3_200, 0.999, 50, 1_000
        c.optimizer.warmup, c.optimizer.adam_learning_rate, c.spike, c.keep_pages = 200, 5e-3, 20.0, False
    if variant == "reference-2":  # the run of the part before (config.init) goes on
        c.seed, c.steps, c.optimizer.warmup = 1, 981, 30
        c.optimizer.learning_rate, c.optimizer.adam_learning_rate = 8e-3, 2e-3
    if variant in ("reference-3", "reference-4"):  # and on, each on new documents
        d.mixture = (
            ("plain", 0.11), ("draw", 0.08), ("refusal", 0.02), ("edit", 0.24), ("style", 0.05), ("ask", 0.05), ("caption", 0.05),
            ("detail", 0.05), ("compare", 0.02), ("mix", 0.015), ("reason", 0.02), ("dialogue", 0.07), ("story", 0.005),
            ("prose", 0.005), ("sign", 0.08), ("poster", 0.04), ("chart", 0.04), ("diagram", 0.03), ("comic", 0.04),
        )  # fmt: skip
        c.seed, c.steps, c.optimizer.warmup, c.save_every = 2, 6_435, 100, 2_000
        c.optimizer.final = 0.765  # the next part begins near there: this was the first third of a longer fall
        c.optimizer.learning_rate, c.optimizer.adam_learning_rate = 1.5e-2, 4e-3
    if variant == "reference-4":
        c.seed, c.steps, c.optimizer.warmup, c.optimizer.final = 3, 4_457, 20, 0.0
        c.optimizer.learning_rate, c.optimizer.adam_learning_rate = 1e-2, 2.7e-3
    if variant == "reference-5":  # words: spelt, and a third of all tokens
        d.mixture = (
            ("sign", 0.32), ("poster", 0.06), ("edit", 0.22), ("dialogue", 0.06), ("draw", 0.05), ("style", 0.05), ("plain", 0.03),
            ("ask", 0.04), ("caption", 0.04), ("detail", 0.03), ("chart", 0.02), ("comic", 0.02), ("diagram", 0.015),
            ("compare", 0.01), ("mix", 0.01), ("reason", 0.01), ("refusal", 0.01), ("prose", 0.0025), ("story", 0.0025),
        )  # fmt: skip
        c.seed, c.steps, c.optimizer.warmup, c.save_every = 4, 5_314, 100, 2_000
        c.optimizer.final = 0.825  # as in reference-3
        c.optimizer.learning_rate, c.optimizer.adam_learning_rate = 1.5e-2, 4e-3
    if variant == "reference-6":  # all tasks again, most of what is weak
        d.mixture = (
            ("edit", 0.27), ("sign", 0.14), ("poster", 0.05), ("dialogue", 0.08), ("draw", 0.07), ("style", 0.06), ("caption", 0.07),
            ("ask", 0.055), ("detail", 0.04), ("count", 0.035), ("plain", 0.025), ("chart", 0.02), ("comic", 0.02),
            ("diagram", 0.015), ("compare", 0.015), ("mix", 0.01), ("reason", 0.01), ("refusal", 0.01), ("prose", 0.0025),
            ("story", 0.0025),
        )  # fmt: skip
        c.seed, c.steps, c.optimizer.warmup, c.optimizer.final, c.save_every = 5, 8_187, 20, 0.0, 2_000
        c.optimizer.learning_rate, c.optimizer.adam_learning_rate = 1.15e-2, 3.1e-3
    if variant == "dialogue":  # a quickstart run (config.init) goes on: docs/posttraining.md
        d.mixture = (("draw", 0.3), ("edit", 0.3), ("dialogue", 0.3), ("question", 0.05), ("caption", 0.05))
        d.batch_size, d.row_length, d.overlong = 3, 560, "drop"
        d.image_drop = 0.05  # edits are guided by their images too
        c.steps, c.optimizer.learning_rate, c.optimizer.adam_learning_rate = 3_000, 4e-3, 1.2e-3
    if variant == "tiny":  # for tests: seconds
        m.width, m.layers, m.heads, m.kv_heads, m.head_dim, m.mlp = 32, 2, 2, 1, 16, 64
        m.encoder = dict(width=32, layers=1, heads=2, kv_heads=1, head_dim=16, mlp=64)
        d.batch_size = 4
        c.steps, c.log_every, c.save_every = 20, 10, 10
        c.optimizer.warmup = 2
    if variant in ("350m", "1b", "7b"):
        width, layers, heads, kv_heads, mlp = {
            "350m": (1024, 24, 16, 8, 2816),
            "1b": (2048, 20, 16, 8, 5632),
            "7b": (4096, 32, 32, 8, 11264),
        }[variant]
        m.width, m.layers, m.heads, m.kv_heads, m.mlp = width, layers, heads, kv_heads, mlp
        m.head_dim, m.rope_base = width // heads, 100_000.0
        m.dtype, m.remat, m.unroll, m.vocab_multiple = "bfloat16", "attention", False, 256
        m.cross_every = 4
        m.encoder = dict(width=width, layers=4, heads=heads, kv_heads=kv_heads, head_dim=m.head_dim, mlp=mlp)
        c.loss.chunk = 2048
        d.batch_size, d.row_length = 256, 4096
        c.steps, c.optimizer.warmup, c.optimizer.weight_decay, c.optimizer.final = 100_000, 2_000, 0.1, 0.1
        c.optimizer.learning_rate, c.optimizer.adam_learning_rate = 5e-3, 3e-4
        c.optimizer.beta2 = 0.95
        c.ema = 0.9999
        c.keep_pages = False
        c.log_every, c.evaluate_every, c.save_every, c.keep = 100, 5_000, 2_000, 3
        c.spike, c.keep_every = 20.0, 10_000
        c.mesh.data, c.mesh.fsdp = 1, -1
    return c
