"""Reads calls of `qm create` and `qm set` (a JSON list of argument lists) on stdin, and checks every option
against the schema of Proxmox VE's API as the package clientapi-pve has it. Prints what is wrong."""

import json
import re
import sys

import clientapi_pve.models as models
from pydantic import ValidationError

CREATE = models.QemuCreateVmRequest
OPTIONS = set(getattr(CREATE, "_QemuCreateVmRequest__properties"))
# Options with a comma-separated list: the class of the list, and the key that may be left out.
LISTS = {
    "sata": (models.PveSataConfig, "file"),
    "ide": (models.PveIdeConfig, "file"),
    "scsi": (models.PveScsiConfig, "file"),
    "virtio": (models.PveVirtioConfig, "file"),
    "efidisk": (models.PveEfidiskConfig, "file"),
    "tpmstate": (models.PveTpmstateConfig, "file"),
    "agent": (models.PveAgentConfig, "enabled"),
    "net": (models.PveQemuNetConfig, "model"),
    "vga": (models.PveVgaConfig, "type"),
    "memory": (models.PveMemoryConfig, "current"),
    "machine": (models.PveMachineConfig, "type"),
}
# `qm` has these besides those of the API.
QM_ONLY = {"delete"}
NET_MODELS = {"e1000", "e1000e", "rtl8139", "virtio", "vmxnet3", "ne2k_pci"}


def objection(cls, key, value, more):
    """Why the key may not have the value; what else the class wants is not asked for."""
    candidates = [value]
    if re.fullmatch(r"-?\d+", value):
        candidates += [int(value)]
    if value in ("on", "off", "0", "1"):
        candidates += [value in ("on", "1")]
    problem = None
    for candidate in candidates:
        try:
            cls.model_validate({key: candidate, **more})
            return None
        except ValidationError as e:
            about = [x["msg"] for x in e.errors() if x["loc"] and x["loc"][0] == key]
            if not about:
                return None
            problem = problem or "; ".join(about)
    return problem


def names(cls):
    return {field.alias or name for name, field in cls.model_fields.items()}


def check_list(option, value):
    cls, default = LISTS[re.sub(r"\d+$", "", option)]
    for n, part in enumerate(value.split(",")):
        key, equals, text = part.partition("=")
        if n == 0 and not equals:
            key, text = default, part
        if cls is models.PveQemuNetConfig and key in NET_MODELS:
            text, key = text, "macaddr"
        if key not in names(cls):
            yield f"--{option}: no key {key!r} in {value!r}"
            continue
        wrong = objection(cls, key, text, {})
        if wrong:
            yield f"--{option} {key}={text}: {wrong}"


def check(call):
    verb, vmid, *rest = call
    if not vmid.isdigit():
        yield f"{verb}: {vmid!r} is no VMID"
    if len(rest) % 2:
        yield f"{verb}: an option without a value in {rest}"
    for option, value in zip(rest[::2], rest[1::2]):
        if not option.startswith("--"):
            yield f"{verb}: {option!r} is no option"
            continue
        name = option[2:]
        if name in QM_ONLY:
            continue
        if name not in OPTIONS:
            yield f"{verb}: there is no option {option}"
        elif re.sub(r"\d+$", "", name) in LISTS:
            yield from check_list(name, value)
        elif name in names(CREATE):
            wrong = objection(CREATE, name, value, {"vmid": 100})
            if wrong:
                yield f"{option} {value}: {wrong}"


problems = [p for call in json.load(sys.stdin) for p in check(call)]
print("\n".join(problems))
sys.exit(bool(problems))
