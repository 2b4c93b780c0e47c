"""The examples of deploy/: they name only what `mmgen serve` has, fit one another, and leave time to stop."""

import argparse
import configparser
import http.server
import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
from types import SimpleNamespace

import pytest
import yaml
from starlette.testclient import TestClient

from mmgen.commands import serve
from mmgen.serving import api, engine
from tests.conftest import ROOT

DEPLOY = ROOT / "deploy"
INSTRUCTIONS = set(
    "ADD ARG CMD COPY ENTRYPOINT ENV EXPOSE FROM HEALTHCHECK LABEL ONBUILD RUN SHELL STOPSIGNAL USER VOLUME "
    "WORKDIR".split()
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def containerfile():
    """[(instruction, what it is given)], continued lines as one."""
    lines = [line for line in (DEPLOY / "Containerfile").read_text().splitlines() if not line.startswith("#")]
    whole = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in whole.splitlines() if line.strip()]


def only(name):
    """What the one instruction of this name is given, in the last stage."""
    (given,) = [given for found, given in last_stage() if found == name]
    return given


def last_stage():
    found = containerfile()
    return found[max(n for n, (name, _) in enumerate(found) if name == "FROM") :]


def unit():
    parser = configparser.ConfigParser(interpolation=None, delimiters="=", comment_prefixes="#")
    parser.optionxform = str  # systemd's names have upper and lower case
    parser.read_string((DEPLOY / "mmgen.service").read_text())
    return parser


def objects():
    """The objects of kubernetes.yaml, by kind."""
    found = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
    kinds = {each["kind"]: each for each in found}
    assert len(kinds) == len(found)
    return SimpleNamespace(**kinds, pod=kinds["Deployment"]["spec"]["template"]["spec"])


def container():
    (found,) = objects().pod["containers"]
    return found


COMMANDS = {
    "image": lambda: [*json.loads(only("ENTRYPOINT")), *json.loads(only("CMD"))],
    "systemd": lambda: shlex.split(unit()["Service"]["ExecStart"]),
    "kubernetes": lambda: [*json.loads(only("ENTRYPOINT")), *container()["args"]],
}


class Parsed(Exception):
    pass


@pytest.fixture
def parsed(monkeypatch):
    """The arguments of one of `COMMANDS`, as the parser of `mmgen serve` has them."""
    parse = argparse.ArgumentParser.parse_args

    def stop(self, argv):
        short = {flag for flag in argv if flag.startswith("--")} - set(self._option_string_actions)
        assert not short, f"{short} are no flags of mmgen serve, at least not in full"
        raise Parsed(parse(self, argv))

    def args(place):
        program, command, *flags = COMMANDS[place]()
        assert program.split("/")[-1] == "mmgen" and command == "serve"
        with monkeypatch.context() as here:
            here.setattr(argparse.ArgumentParser, "parse_args", stop)
            with pytest.raises(Parsed) as found:
                serve.main(flags)
        return found.value.args[0]

    return args


@pytest.fixture(scope="module")
def served():
    """`status(path, ready)` of a server that needs keys, asked without one."""
    model = SimpleNamespace(
        refining=None, tokenizer=SimpleNamespace(patch=8), grammar=SimpleNamespace(max_side=8)
    )
    running = SimpleNamespace(sampler=model, ready=False, alive=True)
    client = TestClient(api.app(running, api.Settings(name="model", gates={}, keys=("secret",))))
    assert client.get("/v1/models").status_code == 401

    def status(path, ready):
        running.ready = ready
        return client.get(path).status_code

    return status


def longest_stop(args):
    """Seconds until the server has ended at the latest: its requests are waited for, then its engine."""
    close = engine.Engine.close
    (more,) = re.findall(r"\.join\(seconds \+ (\d+)\)", inspect.getsource(close))
    return args.drain + int(more)  # the engine is given no time of its own


# ---- all three ----


@pytest.mark.parametrize("place", COMMANDS)
def test_flags_are_those_of_the_command(place, parsed):
    args = parsed(place)
    assert args.safety == "auto" and args.provenance
    assert serve._is_local(args.host) == (place == "systemd"), (
        "from outside a container nobody would reach it"
    )


def test_time_to_stop(parsed):
    seconds = longest_stop(parsed("systemd"))
    assert int(unit()["Service"]["TimeoutStopSec"]) > seconds >= 30
    sleep, before = container()["lifecycle"]["preStop"]["exec"]["command"]
    grace = objects().pod["terminationGracePeriodSeconds"]
    assert sleep == "sleep" and grace > int(before) + longest_stop(parsed("kubernetes"))
    told = [DEPLOY / "Containerfile", ROOT / "docs/serving.md"]
    told = [int(n) for path in told for n in re.findall(r"--stop-timeout[ =](\d+)", path.read_text())]
    assert told and min(told) > longest_stop(parsed("image"))


def test_signals_are_sigterm():
    assert only("STOPSIGNAL") == unit()["Service"]["KillSignal"] == "SIGTERM"


def test_variables_are_read_somewhere():
    named = {name for path in DEPLOY.iterdir() for name in re.findall(r"\bMMGEN_[A-Z_]+", path.read_text())}
    source = "".join(path.read_text() for path in (ROOT / "mmgen").rglob("*.py"))
    assert "MMGEN_API_KEYS" in named
    assert [name for name in named if f'"{name}"' not in source and name != "MMGEN_"] == []


# ---- the image ----


def test_instructions_and_their_order():
    found = containerfile()
    names = [name for name, _ in found]
    assert set(names) <= INSTRUCTIONS and names[0] == "FROM"
    stages = [given.split()[2] for name, given in found if name == "FROM" and " AS " in given]
    sources = [re.findall(r"--from=(\S+)", given) for name, given in found if name == "COPY"]
    assert {stage for stage in sum(sources, [])} == set(stages)
    last = [name for name, _ in last_stage()]
    assert "RUN" not in last[last.index("USER") :], "what is run as the user changes nothing that root owns"
    assert all(last.count(name) == 1 for name in ("USER", "HEALTHCHECK", "ENTRYPOINT", "CMD", "EXPOSE"))
    (extras,) = [given for name, given in found if name == "ARG"]
    name, _, value = extras.partition("=")
    assert name == "EXTRAS" and set(value.split(",")) <= set(PROJECT["project"]["optional-dependencies"])
    assert any(name == "RUN" and ".[${EXTRAS}]" in given for name, given in found)


def test_image_and_command_agree(parsed):
    args = parsed("image")
    assert int(only("EXPOSE")) == args.port
    user, _, group = only("USER").partition(":")
    assert user == group and int(user) > 0 and f"--uid {user} " in " ".join(g for _, g in last_stage())
    home = re.search(r"HOME=(\S+)", only("ENV")).group(1)
    assert json.loads(only("VOLUME")) == [home], "else a read-only container has no place for its keys"
    usage = (DEPLOY / "Containerfile").read_text()
    for place in (args.checkpoint, args.api_keys):
        assert f":{place}:ro" in usage
    assert f":{home} " in usage and f":{args.port} " in usage


def test_context_has_what_is_installed_and_nothing_else():
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] != "#"]
    everything, *kept, last = lines
    project = PROJECT["project"]
    needed = {"pyproject.toml", "setup.py", project["readme"], "mmgen", "configs"}
    needed |= {path.split("/")[0] for path in project["license-files"]}
    assert (everything, last) == ("*", "**/__pycache__")
    assert sorted(kept) == sorted(f"!{name}" for name in needed) and all((ROOT / n).exists() for n in needed)


def test_health_check(served):
    check = only("HEALTHCHECK").partition(" CMD ")[2]
    python, *rest = json.loads(check)
    asked, answers = [], [200, 503]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(answers[len(asked) - 1])
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    port = str(server.server_port)
    assert python == "python" and rest[-1].count(only("EXPOSE")) == 1
    rest[-1] = rest[-1].replace(only("EXPOSE"), port)

    def status():
        proxy = {"http_proxy": "http://127.0.0.1:1"}  # which is not to be asked
        return subprocess.run([sys.executable, *rest], capture_output=True, timeout=20, env=proxy).returncode

    assert [status() == 0, status() == 0] == [True, False]
    server.shutdown()
    server.server_close()
    assert status() != 0
    assert len(asked) == 2 and all(served(path, ready=False) == 200 for path in asked)


# ---- systemd ----


def test_unit():
    found = unit()
    service = found["Service"]
    assert found.sections() == ["Unit", "Service", "Install"]
    assert service["EnvironmentFile"][0] == "/", "with a dash before it the server would start without keys"
    assert f"HOME=%S/{service['StateDirectory']}" in service["Environment"].split()
    assert "MemoryDenyWriteExecute" not in service, "JAX cannot compile under it"


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd here")
def test_systemd_takes_the_unit(tmp_path):
    """A name that systemd does not know is a line in its log, and no error."""
    text = (DEPLOY / "mmgen.service").read_text()
    here = tmp_path / "mmgen.service"
    here.write_text(text.replace(shlex.split(unit()["Service"]["ExecStart"])[0], sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", here], capture_output=True, text=True, timeout=60)
    assert [line for line in done.stderr.splitlines() if "mmgen.service" in line] == []


# ---- Kubernetes ----


def test_probes(served, parsed):
    pod = container()
    (port,) = pod["ports"]
    assert port["containerPort"] == parsed("kubernetes").port
    at = {}
    for name in ("startupProbe", "livenessProbe", "readinessProbe"):
        asked = pod[name]["httpGet"]
        assert asked["port"] == port["name"] and served(asked["path"], ready=True) == 200
        at[name] = served(asked["path"], ready=False)
    assert at["readinessProbe"] == 503
    assert at["startupProbe"] == at["livenessProbe"] == 200, "it would be killed while it compiles"


def test_objects_fit_one_another(parsed):
    found, args, pod = objects(), parsed("kubernetes"), container()
    deployment, labels = (
        found.Deployment["spec"],
        found.Deployment["spec"]["template"]["metadata"]["labels"],
    )
    assert deployment["selector"]["matchLabels"] == found.Service["spec"]["selector"] == labels
    assert found.Service["spec"]["ports"][0]["targetPort"] == pod["ports"][0]["name"]
    assert deployment["replicas"] == 1 and deployment["strategy"]["type"] == "Recreate"
    volumes = {volume["name"]: volume for volume in found.pod["volumes"]}
    mounts = {mount["mountPath"]: mount for mount in pod["volumeMounts"]}
    assert {mount["name"] for mount in mounts.values()} == set(volumes)
    assert mounts[args.checkpoint]["readOnly"]
    folder, _, key = args.api_keys.rpartition("/")
    assert volumes[mounts[folder]["name"]]["secret"]["secretName"] == found.Secret["metadata"]["name"]
    assert list(found.Secret["stringData"]) == [key]
    written = {path for path, mount in mounts.items() if not mount.get("readOnly")}
    assert written == {"/tmp", *json.loads(only("VOLUME"))}, "nothing else can be, and uploads are in /tmp"
    claim = volumes[mounts[json.loads(only("VOLUME"))[0]]["name"]]["persistentVolumeClaim"]["claimName"]
    assert claim == found.PersistentVolumeClaim["metadata"]["name"]


def test_pod_meets_the_restricted_standard():
    """Of kubernetes.io/docs/concepts/security/pod-security-standards; and its files are only read."""
    pod, own = objects().pod["securityContext"], container()["securityContext"]
    user = int(only("USER").partition(":")[0])
    assert pod["runAsNonRoot"] and pod["runAsUser"] == pod["runAsGroup"] == pod["fsGroup"] == user
    assert pod["seccompProfile"]["type"] == "RuntimeDefault" and own["capabilities"] == {"drop": ["ALL"]}
    assert own["allowPrivilegeEscalation"] is False and own["readOnlyRootFilesystem"] is True
    assert set(container()["resources"]["limits"]) >= {"memory"}


def test_the_placeholder_lets_nobody_in(tmp_path):
    (value,) = objects().Secret["stringData"].values()
    keys = tmp_path / "api-keys"
    keys.write_text(value)
    with pytest.raises(ValueError, match="has no keys"):
        serve.main(["--checkpoint", str(tmp_path), "--api-keys", str(keys)])
