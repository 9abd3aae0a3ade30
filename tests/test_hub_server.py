"""The Hub that the tests run against does what clients rely on: it keeps files, resumes transfers and takes a cut."""

import os
import subprocess
import sys

CLIENT = """
import sys
from pathlib import Path
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.file_download import http_get

folder, copy = map(Path, sys.argv[1:])
api = HfApi()
api.create_repo("you/files")
api.upload_folder(repo_id="you/files", folder_path=folder)
api.delete_file("small.txt", "you/files")
snapshot_download("you/files", local_dir=copy)
with open(copy / "rest.bin", "wb") as file:
    file.write((folder / "large.bin").read_bytes()[:150_000])
    url = f"{api.endpoint}/you/files/resolve/main/large.bin"
    http_get(url, file, resume_size=150_000, expected_size=200_000)
api.delete_repo("you/files")
"""


def test_files_come_back_whole_over_a_connection_that_breaks_once(hub, tmp_path):
    (tmp_path / "folder" / "below").mkdir(parents=True)
    contents = {"large.bin": os.urandom(200_000), "below/more.bin": os.urandom(1000), "small.txt": b"words"}
    for name, content in contents.items():
        (tmp_path / "folder" / name).write_bytes(content)
    hub.lfs, hub.cut_after = (".bin",), 100_000
    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_of_you", "HF_HOME": str(tmp_path / "home")}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", CLIENT, tmp_path / "folder", tmp_path / "copy"]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    assert hub.was_cut.is_set() and ("models", "you/files") not in hub.repositories
    for name in ("large.bin", "below/more.bin"):
        assert (tmp_path / "copy" / name).read_bytes() == contents[name]
    assert not (tmp_path / "copy" / "small.txt").exists()
    assert (tmp_path / "copy" / "rest.bin").read_bytes() == contents["large.bin"]
