//! Driver catalogues: the trust list with the hashes of the files, in PKCS#7. They have no
//! signature, like the output of `inf2cat` before signing.

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

/// A certificate as far as a catalogue's reader looks at it.
#[cfg(test)]
#[derive(Clone, Copy)]
pub struct Certificate<'a> {
    pub serial: u8,
    pub subject: &'a [(&'a str, u8, &'a str)],
    pub issuer: &'a [(&'a str, u8, &'a str)],
}

#[cfg(test)]
impl Certificate<'_> {
    /// Of attributes: object identifier, tag of the text, text.
    fn name(parts: &[(&str, u8, &str)]) -> Vec<u8> {
        let part = |(id, tag, text): &(&str, u8, &str)| {
            let text = match tag {
                0x1e => text.encode_utf16().flat_map(u16::to_be_bytes).collect(),
                _ => text.as_bytes().to_vec(),
            };
            let pair = tlv(SEQUENCE, &[&oid(id), &tlv(*tag, &[&text])]);
            tlv(SET, &[&pair])
        };
        let parts: Vec<u8> = parts.iter().flat_map(part).collect();
        tlv(SEQUENCE, &[&parts])
    }

    fn id(&self) -> [Vec<u8>; 2] {
        [Self::name(self.issuer), tlv(0x02, &[&[self.serial]])]
    }

    fn der(&self) -> Vec<u8> {
        let [issuer, serial] = self.id();
        let version = tlv(CONTEXT_0, &[&[2, 1, 2]]);
        let (none, subject) = (tlv(SEQUENCE, &[]), Self::name(self.subject));
        let body = tlv(
            SEQUENCE,
            &[&version, &serial, &none, &issuer, &none, &subject, &none],
        );
        tlv(SEQUENCE, &[&body, &none, &tlv(0x03, &[&[0]])])
    }
}

/// A catalogue whose signer info names this certificate and has this digest of the list's contents. The
/// signature itself is empty.
#[cfg(test)]
pub fn signed(
    files: &[&[u8]],
    certificates: &[Certificate<'_>],
    by: &Certificate<'_>,
    digest: impl FnOnce(&[u8]) -> Vec<u8>,
) -> Vec<u8> {
    let list = trust_list(files);
    let header = match list[1] {
        0..=0x7f => 2,
        long => 2 + usize::from(long & 0x7f),
    };
    let digest = digest(&list[header..]);
    let content = tlv(
        SEQUENCE,
        &[&oid("1.3.6.1.4.1.311.10.1"), &tlv(CONTEXT_0, &[&list])],
    );
    let value = tlv(SET, &[&tlv(OCTET_STRING, &[&digest])]);
    let attribute = tlv(SEQUENCE, &[&oid("1.2.840.113549.1.9.4"), &value]);
    let none = tlv(SEQUENCE, &[]);
    let info = tlv(
        SEQUENCE,
        &[
            &[2, 1, 1],
            &tlv(SEQUENCE, &[&by.id().concat()]),
            &none,
            &tlv(CONTEXT_0, &[&attribute]),
            &none,
            &tlv(OCTET_STRING, &[]),
        ],
    );
    let certificates: Vec<u8> = certificates.iter().flat_map(Certificate::der).collect();
    let certificates = tlv(CONTEXT_0, &[&certificates]);
    let infos = tlv(SET, &[&info]);
    let data = tlv(
        SEQUENCE,
        &[&[2, 1, 1], &tlv(SET, &[]), &content, &certificates, &infos],
    );
    let data = tlv(CONTEXT_0, &[&data]);
    tlv(SEQUENCE, &[&oid("1.2.840.113549.1.7.2"), &data])
}
