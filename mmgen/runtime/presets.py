"""Values that every config starts from."""

# Logical axis -> mesh axes. Parameters name their logical axes where they are created; an axis
# without a rule is an error, None is replicated.
SHARDING = {
    # activations
    "batch": ("replica", "data", "fsdp"),
    "length": "context",  # tokens of a row
    "stream": "context",  # tokens of a row, between the halves of a block: ("context", "tensor") is sequence parallel
    # parameters
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "gate": None,
    "mlp": "tensor",
    "pixels": None,
    "window": None,
    "place": None,
    "code": None,
    "joint": None,
    "query": None,
    "label": None,
}

OPTIMIZER = {
    "name": "muon",
    "learning_rate": 2e-2,
    "adam_learning_rate": 1e-2,
    "warmup": 50,
    "final": 0.0,
    "weight_decay": 0.0,
    "beta1": 0.9,
    "beta2": 0.95,
    "clip": 1.0,
}

MESH = {
    "replica": 1,
    "data": -1,
    "fsdp": 1,
    "context": 1,
    "tensor": 1,
}  # devices along each axis; -1: the rest

LOOP = {
    "accumulate": 1,  # parts that a batch is computed in, one after the other; their gradients are summed
    "spike": 0.0,  # skip steps whose gradient norm is over so many times its running mean; 0: only what is not finite
    "max_skipped": 10,  # steps skipped in a row after which the run gives up
    "step_limit": 600.0,  # seconds after which a step counts as stuck: stacks are dumped, the process ends; 0: never
    "keep_every": 0,  # steps whose checkpoints stay for ever; 0: none
    "best": "",  # "psnr:max": the best checkpoint by a metric stays as well
    "init": "",  # workdir of another run whose weights a new run begins with
    "profile": (0, 0),  # first step and the one after the last of a profiler trace
    "wandb": "",  # project of Weights & Biases to log to
}
