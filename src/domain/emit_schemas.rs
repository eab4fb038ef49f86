//! Validates the files of `--emit` against the schemas of their targets. These are the types
//! generated from the CRDs of KubeVirt and CDI, and the options of Proxmox VE's API. `.ci/run`
//! fetches both; they are not part of the sources.

#![allow(clippy::disallowed_methods)]

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use super::emit_tests::{FakeQm, documents, full, yaml};
use super::tests::machine;
use super::*;
use crate::skip::{have, skip};

/// A directory that `.ci/run` fills.
fn schemas(name: &str, program: &str) -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("target")
        .join(name);
    if folder.join(program).exists() {
        return Some(folder);
    }
    skip(
        name,
        format!("no target/{name}/{program}: .ci/run makes it"),
    );
    None
}

/// VMs that differ in every possible part of a document.
fn machines() -> Vec<Machine> {
    let mut list = vec![machine(), full()];
    let mut bios = machine();
    (bios.firmware, bios.nvram) = (Firmware::Bios, None);
    bios.bus = DiskBus::VirtioScsi;
    list.push(bios.clone());
    bios.bootstrap = None;
    list.push(bios);
    let mut many = full();
    for n in 2..9 {
        let mut more = many.disks[1].clone();
        (more.path, more.serial) = (format!("/vm/d{n}.raw").into(), Some(format!("h2k-{n}")));
        many.disks.push(more);
    }
    let map = [
        "prod=nad:net/prod",
        "prod=pve:vmbr7@40",
        "dmz=br:br1@7",
        "off=none",
    ];
    let map = NetworkMap::new(map.iter().map(|m| m.parse().unwrap()).collect()).unwrap();
    for (n, network) in ["prod", "dmz", "off", "VM Network"].into_iter().enumerate() {
        let mut nic = Nic {
            network: Some(network.to_owned()),
            ..Nic::new(
                MacAddr::qemu([1, 0, n as u8]),
                NicSource::Network("default".into()),
            )
        };
        map.apply(&mut nic);
        many.nics.push(nic);
    }
    many.firmware = Firmware::Uefi { secure_boot: true };
    list.push(many);
    for m in &mut list {
        // Proxmox cannot name a file with a comma.
        m.disks[0].path = "/vm/a b.qcow2".into();
    }
    list
}

fn options() -> kubevirt::Options {
    kubevirt::Options {
        namespace: Some("prod".parse().unwrap()),
        storage_class: Some("ceph.rbd".into()),
        access_mode: Some("ReadWriteMany"),
        instance_type: Some("u1.large".parse().unwrap()),
        preference: Some("namespaced/windows.11".parse().unwrap()),
    }
}

/// The compiler's errors for the documents as values of those types.
fn typed(folder: &Path, documents: &[Value]) -> (bool, String) {
    let mut text = String::from(
        "import type { V1VirtualMachine } from '@kubevirt-ui-ext/kubevirt-api/kubevirt';\n\
         import type { V1beta1DataVolume } from '@kubevirt-ui-ext/kubevirt-api/containerized-data-importer';\n\
         // Values of an enumeration in their JSON form.\n\
         type Json<T> = T extends string ? `${T}` : T extends (infer U)[] ? Json<U>[]\
           : T extends object ? { [K in keyof T]: Json<T[K]> } : T;\n",
    );
    for (n, document) in documents.iter().enumerate() {
        let kind = match document["kind"].as_str().unwrap() {
            "VirtualMachine" => "V1VirtualMachine",
            "DataVolume" => "V1beta1DataVolume",
            // Of another project, and a single string.
            "NetworkAttachmentDefinition" => continue,
            other => panic!("a {other}"),
        };
        text.push_str(&format!(
            "export const d{n}: Json<{kind}> = {document:#};\n"
        ));
    }
    let dir = tempfile::tempdir_in(folder).unwrap();
    let file = dir.path().join("documents.mts");
    fs::write(&file, text).unwrap();
    let run = Command::new("node")
        .arg(folder.join("node_modules/typescript/bin/tsc"))
        .args([
            "--noEmit",
            "--strict",
            "--skipLibCheck",
            "--module",
            "nodenext",
        ])
        .arg(&file)
        .output()
        .unwrap();
    (
        run.status.success(),
        String::from_utf8_lossy(&run.stdout).into_owned(),
    )
}

#[test]
fn kubevirt_documents_have_the_types_of_its_api() {
    let Some(folder) = schemas("kubevirt-types", "node_modules/typescript/bin/tsc") else {
        return;
    };
    if !have(&["node"]) {
        return;
    }
    let mut list = Vec::new();
    for m in &machines() {
        for options in [kubevirt::Options::default(), options()] {
            let texts = documents(Emit::Kubevirt, m, &options);
            list.extend(texts.iter().flat_map(|text| yaml(text)));
        }
    }
    let (ok, said) = typed(&folder, &list);
    assert!(ok, "{said}");
    // It detects faults where there are some.
    let of_kind = |kind: &str| list.iter().find(|d| d["kind"] == kind).unwrap().clone();
    let (mut vm, mut volume) = (of_kind("VirtualMachine"), of_kind("DataVolume"));
    vm["spec"]["template"]["spec"]["domain"]["devices"]["disk"] = json!([]);
    volume["spec"]["storage"]["accessModes"] = json!("ReadWriteOnce");
    let (ok, said) = typed(&folder, &[vm, volume]);
    assert!(!ok && said.matches("error TS").count() == 2, "{said}");
}

#[test]
fn proxmox_options_are_those_of_its_api() {
    let Some(folder) = schemas("proxmox-schema", "bin/python") else {
        return;
    };
    let validate = |calls: &Value| {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/qm_schema.py");
        let mut child = Command::new(folder.join("bin/python"))
            .arg(script)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = child.stdin.take().unwrap();
        input.write_all(calls.to_string().as_bytes()).unwrap();
        drop(input);
        let run = child.wait_with_output().unwrap();
        (
            run.status.success(),
            String::from_utf8_lossy(&run.stdout).into_owned(),
        )
    };
    let mut calls = Vec::new();
    for m in &machines() {
        let qm = FakeQm::new(m);
        for stage in ["bootstrap", "final", "back"] {
            // A VM without a first boot has only its final form.
            let (ok, text) = qm.run(&[stage, "100"]);
            assert!(ok || m.bootstrap.is_none(), "{stage}: {text}");
        }
        for line in qm.calls().lines() {
            let words = line.trim_start_matches('[').trim_end_matches(']');
            let words: Vec<&str> = words.split("][").collect();
            if matches!(words[0], "create" | "set") {
                calls.push(json!(words));
            }
        }
    }
    assert!(calls.len() >= 50, "{}", calls.len());
    // The last ones are wrong and must be detected.
    let wrong = json!([
        ["set", "100", "--sata6", "a:0"],
        ["set", "100", "--virtio0", "a:0,discards=on"],
        ["set", "100", "--net0", "virtio=00:0c:29:aa:bb:01,tag=lan"],
        ["create", "100", "--ostype", "windows"],
    ]);
    let (ok, said) = validate(&wrong);
    assert!(!ok && said.lines().count() == 4, "{said}");
    let (ok, said) = validate(&json!(calls));
    assert!(ok, "{said}");
}
