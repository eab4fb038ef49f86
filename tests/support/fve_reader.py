"""Reads sectors of a BitLocker volume with another program, for tests/engines/bitlocker/.

fve_reader.py dissect|libbde IMAGE recovery|password|file|clear KEY SECTORS
SECTORS is a file with a sector number in each line. Prints the SHA-256 of these sectors, one after the other.
"""

import hashlib
import sys


def with_dissect(image, kind, key):
    from dissect.fve.bde import BDE

    volume = BDE(open(image, "rb"))
    if kind == "recovery":
        volume.unlock_with_recovery_password(key)
    elif kind == "password":
        volume.unlock_with_passphrase(key)
    elif kind == "file":
        volume.unlock_with_bek(open(key, "rb"))
    else:
        volume.unlock_with_clear_key()
    stream = volume.open()

    def read(offset):
        stream.seek(offset)
        return stream.read(512)

    return read


def with_libbde(image, kind, key):
    import pybde

    volume = pybde.volume()
    if kind == "recovery":
        volume.set_recovery_password(key)
    elif kind == "password":
        volume.set_password(key)
    elif kind == "file":
        volume.read_startup_key(key)
    volume.open(image)
    assert not volume.is_locked()
    return lambda offset: volume.read_buffer_at_offset(512, offset)


program, image, kind, key, sectors = sys.argv[1:]
read = {"dissect": with_dissect, "libbde": with_libbde}[program](image, kind, key)
digest = hashlib.sha256()
for line in open(sectors):
    digest.update(read(int(line) * 512))
print(digest.hexdigest())
