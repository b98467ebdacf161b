"""Keys on the command line: fingerprints that openssl gives too, and bundles that are signed anew."""

import hashlib
import subprocess
from pathlib import Path

import pytest

from kizu_contract.bundle import read_bundle
from kizu_contract.errors import BundleError
from kizu_contract.signing import fingerprint_of, load_fingerprints, load_public_key
from kizu_export.__main__ import main


def test_a_fingerprint_is_what_openssl_gives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Keygen prints the SHA-256 of the key as DER."""
    assert main(["keygen", "--out", str(tmp_path)]) == 0
    command = ["openssl", "pkey", "-pubin", "-in", str(tmp_path / "kizu-public.pem"), "-outform", "DER"]
    der = subprocess.run(command, check=True, capture_output=True, timeout=20).stdout
    assert hashlib.sha256(der).hexdigest() in capsys.readouterr().out


def test_a_bundle_is_signed_anew(bundle_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`sign` takes the place of another signature and leaves the content's name as it is; `inspect` tells by whom."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        main(["keygen", "--out", str(folder)])
    once, twice = tmp_path / "once.kizu", tmp_path / "twice.kizu"
    assert main(["sign", str(bundle_file), "--key", str(first / "kizu-private.pem"), "--out", str(once)]) == 0
    assert main(["sign", str(once), "--key", str(second / "kizu-private.pem"), "--out", str(twice)]) == 0
    public = second / "kizu-public.pem"
    read = read_bundle(twice, [load_public_key(public)], require_signature=True)
    assert (read.sha256, read.is_signed) == (read_bundle(bundle_file).sha256, True)
    capsys.readouterr()
    assert main(["inspect", str(twice), "--key", str(public)]) == 0
    assert fingerprint_of(load_public_key(public)) in capsys.readouterr().out
    assert main(["inspect", str(twice), "--key", str(first / "kizu-public.pem")]) == 1
    for path, words in ((twice, "yes"), (bundle_file, "no")):
        capsys.readouterr()
        assert main(["inspect", str(path)]) == 0
        assert any(
            line.split()[:2] in (["signed", words], ["signed", f"{words};"])
            for line in capsys.readouterr().out.splitlines()
        )


@pytest.mark.parametrize("text", ["ab", "g" * 64, "0" * 63, "0" * 64 + " 0"])
def test_a_list_with_a_slip_is_refused_whole(tmp_path: Path, text: str) -> None:
    """A line that is no fingerprint is named by its number."""
    path = tmp_path / "revoked.txt"
    path.write_text(f"# keys\n{'a' * 64}\n{text}\n")
    with pytest.raises(BundleError, match="line 3 is no fingerprint"):
        load_fingerprints(path)
