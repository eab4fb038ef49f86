//! Driver catalogues: the trust list with the hashes of the files, in PKCS#7 without a signature,
//! like the output of `inf2cat` before signing.

use der::asn1::ObjectIdentifier;

use crate::drivers::authenticode::member_hash;

const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const OCTET_STRING: u8 = 0x04;
const CONTEXT_0: u8 = 0xa0;

fn tlv(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
    let contents = parts.concat();
    let mut out = vec![tag];
    match contents.len() {
        len @ 0..=0x7f => out.push(len as u8),
        len => {
            let bytes = (len as u32).to_be_bytes();
            let skip = bytes.iter().take_while(|b| **b == 0).count();
            out.push(0x80 | (4 - skip) as u8);
            out.extend(&bytes[skip..]);
        }
    }
    out.extend(contents);
    out
}

fn oid(dotted: &str) -> Vec<u8> {
    tlv(0x06, &[ObjectIdentifier::new_unwrap(dotted).as_bytes()])
}

fn member(file: &[u8]) -> Vec<u8> {
    let hash = member_hash(file);
    let sha256 = tlv(SEQUENCE, &[&oid("2.16.840.1.101.3.4.2.1"), &[5, 0]]);
    let digest = tlv(SEQUENCE, &[&sha256, &tlv(OCTET_STRING, &[&hash])]);
    let kind = tlv(SEQUENCE, &[&oid("1.3.6.1.4.1.311.2.1.15")]);
    let data = tlv(SET, &[&tlv(SEQUENCE, &[&kind, &digest])]);
    let attribute = tlv(SEQUENCE, &[&oid("1.3.6.1.4.1.311.2.1.4"), &data]);
    let id = tlv(OCTET_STRING, &[&hash]);
    tlv(SEQUENCE, &[&id, &tlv(SET, &[&attribute])])
}

/// The signed part.
pub fn trust_list(files: &[&[u8]]) -> Vec<u8> {
    let usage = tlv(SEQUENCE, &[&oid("1.3.6.1.4.1.311.12.1.1")]);
    let id = tlv(OCTET_STRING, &[b"hyper2kvm demo\0\0"]);
    let time = tlv(0x17, &[b"250120000000Z"]);
    let algorithm = tlv(SEQUENCE, &[&oid("1.3.6.1.4.1.311.12.1.3"), &[5, 0]]);
    let members: Vec<u8> = files.iter().flat_map(|file| member(file)).collect();
    let members = tlv(SEQUENCE, &[&members]);
    tlv(SEQUENCE, &[&usage, &id, &time, &algorithm, &members])
}

/// A catalogue without a signature.
pub fn unsigned(files: &[&[u8]]) -> Vec<u8> {
    let list = tlv(CONTEXT_0, &[&trust_list(files)]);
    let content = tlv(SEQUENCE, &[&oid("1.3.6.1.4.1.311.10.1"), &list]);
    let data = tlv(
        SEQUENCE,
        &[&[2, 1, 1], &tlv(SET, &[]), &content, &tlv(SET, &[])],
    );
    let data = tlv(CONTEXT_0, &[&data]);
    tlv(SEQUENCE, &[&oid("1.2.840.113549.1.7.2"), &data])
}
