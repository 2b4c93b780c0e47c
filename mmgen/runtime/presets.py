"""Values that every config starts from."""

# Logical axis -> mesh axes. Parameters name their logical axes where they are created; an axis
# without a rule is an error, None is replicated.
SHARDING = {
    # activations
    "batch": ("replica", "data", "fsdp"),
    "length": "context",
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
