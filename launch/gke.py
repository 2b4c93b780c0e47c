"""A run over the nodes of a GKE cluster, as a JobSet (https://jobset.sigs.k8s.io), given to kubectl.

    python launch/gke.py --tpu tpu-v5p-slice --topology 4x4x4 --image IMAGE --claim CLAIM -- \\
        --config transformer:7b --workdir /data/runs/7b --config.data.shards=/data/shards
    python launch/gke.py --gpu nvidia-h100-80gb --nodes 2 --image IMAGE --claim CLAIM -- ...

IMAGE is a container with mmgen and its extra tpu or gpu; CLAIM a volume that several nodes may write, found
at /data. One process a node. When one fails all are started again, up to --max-restarts times; those that
saved because their node was taken away (status 75) or that were evicted, without limit. Launched again, a run
that goes on is left alone, and one that has ended is started anew and resumes.
"""

import json
import math
import subprocess
import sys

import flags


def main(argv):
    parser = flags.parser(__doc__)
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--tpu", type=flags.word, help="the node label gke-tpu-accelerator, as tpu-v5p-slice")
    kind.add_argument("--gpu", type=flags.word, help="the node label gke-accelerator, as nvidia-h100-80gb")
    parser.add_argument("--topology", help="of a TPU slice, as 4x4x4 or 4x8")
    parser.add_argument("--chips-per-node", type=flags.count(1), default=4, help="TPU chips")
    parser.add_argument("--slices", type=flags.count(1), default=1, help="TPU slices, each a node pool")
    parser.add_argument("--nodes", type=flags.count(1), default=1, help="GPU nodes")
    parser.add_argument("--gpus-per-node", type=flags.count(1), default=8)
    parser.add_argument("--image", required=True)
    parser.add_argument("--claim", required=True, help="PersistentVolumeClaim, found at /data")
    parser.add_argument("--name", type=flags.word, help="default: from the workdir")
    parser.add_argument("--namespace", type=flags.word, default="default")
    parser.add_argument("--spot", action="store_true")
    parser.add_argument("--max-restarts", type=flags.count(0), default=10)
    parser.add_argument("--grace", type=flags.count(1), default=120, help="seconds for saving")
    args, training = flags.parse(parser, argv)
    workdir = flags.shared_workdir(parser, training)
    if not workdir.startswith("/data/"):
        parser.error(f"--workdir must be in /data, where the claim is found; {workdir} ends with its pod")
    name = args.name or flags.name_of(workdir)
    if args.tpu:
        try:
            chips = math.prod(int(side) for side in args.topology.split("x"))
        except (AttributeError, ValueError):
            parser.error(f"--topology is the shape of the TPU slice, as 4x4x4; found {args.topology}")
        if chips < args.chips_per_node or chips % args.chips_per_node:
            parser.error(
                f"{args.topology} is {chips} chips, which {args.chips_per_node} a node do not divide"
            )
        nodes = chips // args.chips_per_node
        container, pod, annotations = tpu(args)
    else:
        nodes = args.nodes
        container, pod, annotations = gpu(args, name)

    container |= {"name": "train", "image": args.image}
    container["env"].append({"name": "PYTHONUNBUFFERED", "value": "1"})
    container["args"] = ["mmgen", *training]  # "$@" of the command
    container["volumeMounts"] = [
        {"name": "data", "mountPath": "/data"},
        {"name": "memory", "mountPath": "/dev/shm"},
    ]
    pod |= {
        "restartPolicy": "Never",  # a process that comes back alone finds no others
        "terminationGracePeriodSeconds": args.grace,
        "containers": [container],
        "volumes": [
            {"name": "data", "persistentVolumeClaim": {"claimName": args.claim}},
            {"name": "memory", "emptyDir": {"medium": "Memory"}},
        ],
    }
    if args.spot:
        pod["nodeSelector"]["cloud.google.com/gke-spot"] = "true"
    job = {
        "completionMode": "Indexed",
        "completions": nodes,
        "parallelism": nodes,
        "backoffLimit": 0,  # one pod's failure is the job's, and restarts the set
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": "train", "operator": "In", "values": [75]},
                },
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": {"spec": pod},
    }
    again = {"name": "preempted", "action": "RestartJobSetAndIgnoreMaxRestarts"}
    jobset = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name, "namespace": args.namespace, "annotations": annotations},
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": args.max_restarts,
                "restartStrategy": "BlockingRecreate",  # never two generations in one workdir
                "rules": [again | {"onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [
                {"name": "slice", "replicas": args.slices if args.tpu else 1, "template": {"spec": job}}
            ],
        },
    }
    text = json.dumps(jobset, indent=2)  # which is YAML too
    if args.dry_run:
        print(text)
        return 0
    found = ["jobset", name, f"--namespace={args.namespace}", "--ignore-not-found"]
    ask = ["kubectl", "get", *found, "--output=jsonpath={.status.terminalState}"]
    if subprocess.run(ask, stdout=subprocess.PIPE, text=True, check=True).stdout:  # Completed or Failed
        subprocess.run(["kubectl", "delete", *found], check=True)
    return subprocess.run(["kubectl", "apply", "--filename=-"], input=text, text=True).returncode


def tpu(args):
    """(container, pod, annotations of the set) of TPU nodes: GKE tells each who it is, and JAX asks."""
    container = {
        "command": ["/bin/bash", "-c", 'exec mmgen train "$@"'],  # exec: signals reach mmgen itself
        "env": [{"name": "MMGEN_DISTRIBUTED", "value": "auto"}],
        "resources": {"limits": {"google.com/tpu": args.chips_per_node}},
    }
    selector = {
        "cloud.google.com/gke-tpu-accelerator": args.tpu,
        "cloud.google.com/gke-tpu-topology": args.topology,
    }
    # The node's own network: slices talk to one another over it.
    pod = {"nodeSelector": selector, "hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    return container, pod, {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}


def gpu(args, name):
    """(container, pod, annotations of the set) of GPU nodes: the job says which of the processes each is."""
    start = f'MMGEN_DISTRIBUTED=$JOB_COMPLETION_INDEX/{args.nodes} exec mmgen train "$@"'
    container = {
        "command": ["/bin/bash", "-c", start],
        "env": [{"name": "JAX_COORDINATOR_ADDRESS", "value": f"{name}-slice-0-0.{name}:12355"}],
        "resources": {"limits": {"nvidia.com/gpu": args.gpus_per_node}},
    }
    return container, {"nodeSelector": {"cloud.google.com/gke-accelerator": args.gpu}}, {}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
