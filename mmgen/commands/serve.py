"""`mmgen serve --checkpoint DIR`: an HTTP API that clients of OpenAI's speak, and a page."""

import argparse
import ipaddress
import os
from pathlib import Path

from mmgen.commands.common import (
    add_refiner_flags,
    add_safety_flags,
    add_sampler_flags,
    add_sampling_flags,
    grid_of,
    load_sampler,
    safety_from,
    sampling_options,
    signer_from,
    size,
    with_defaults,
    with_refiner,
)
from mmgen.runtime import hardware


def main(argv):
    """Serves a model: images, edits and dialogues over HTTP (docs/serving.md), and a page to play with at /. It listens to this machine
    alone unless --host says otherwise."""
    parser = argparse.ArgumentParser("mmgen serve", description=main.__doc__)
    add = parser.add_argument
    add_sampler_flags(parser)
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8000)
    add("--name", help="of the model, for clients (default: the checkpoint's folder)")
    add(
        "--size",
        type=size,
        help="WIDTHxHEIGHT of pictures for which a client names none (default: the model chooses)",
    )
    add("--slots", type=int, default=4, help="requests that are answered at once")
    add("--queue", type=int, default=64, help="... and that wait, before others are sent away (429)")
    add("--every", type=int, default=32, help="tokens between two looks at who came and who left")
    add("--deadline", type=float, default=120.0, help="seconds that a request may take, waiting included")
    add(
        "--drain",
        type=float,
        default=30.0,
        help="seconds that running requests get when the server is stopped",
    )
    add(
        "--keep",
        type=float,
        default=3600.0,
        help="seconds for which a dialogue is kept that nobody goes on with",
    )
    add("--keep-bytes", type=int, default=64 << 20, help="bytes of all dialogues that are kept")
    add("--body", type=int, default=64 << 20, help="most bytes of a request")
    add(
        "--api-keys",
        metavar="FILE",
        help="one a line; clients then need one (or MMGEN_API_KEYS, comma-separated)",
    )
    add_sampling_flags(parser)
    add_refiner_flags(parser)
    add_safety_flags(parser)
    args = parser.parse_args(argv)
    try:
        from mmgen.serving import api, dialogues, engine, wire
    except ModuleNotFoundError as error:
        raise RuntimeError(f"{error.name} is missing: pip install 'mmgen[serve]'") from None
    keys = tuple(
        line.strip() for line in Path(args.api_keys).read_text("utf-8").splitlines() if line.strip()
    ) if args.api_keys else tuple(key for key in os.environ.get("MMGEN_API_KEYS", "").split(",") if key)  # fmt: skip
    if args.api_keys and not keys:
        raise ValueError(f"{args.api_keys} has no keys: expected one a line")
    if args.deadline <= 0 or args.drain < 0 or args.keep <= 0 or args.body < 1:
        raise ValueError("expected --deadline, --keep and --body above 0, and --drain of at least 0")
    if not keys and not _is_local(args.host):
        print(f"! {args.host} is open to others, and no key is needed: see --api-keys", flush=True)

    hardware.set_up()
    gates = {"off": safety_from(args)}
    if args.safety != "off":  # a client may ask for either strictness, up to the one that is named here
        gates = {args.safety: gates["off"]}
        if args.safety == "auto":
            args.safety = "low"
            gates["low"] = safety_from(args)
    signer = signer_from(args)
    model = with_refiner(load_sampler(args), args.checkpoint, args)
    pixels = args.size
    if pixels and model.refining:
        pixels = tuple(side // model.refining.refiner.scale for side in pixels)
    grid = grid_of(pixels, model) if pixels else None
    settings = api.Settings(
        name=args.name or Path(args.checkpoint).resolve().name, gates=gates, signer=signer, keys=keys, size=args.size,
        options=sampling_options(with_defaults(args, args.checkpoint)), seconds=args.deadline, body=args.body,
        store=dialogues.Store(args.keep, args.keep_bytes),
    )  # fmt: skip
    running = engine.Engine(model, size=grid, slots=args.slots, waiting=args.queue, every=args.every)
    served = api.app(running, settings)
    wire.server(served, drain=args.drain, host=args.host, port=args.port, log_level="info").run()


def _is_local(host):
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
