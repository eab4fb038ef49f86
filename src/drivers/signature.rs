//! Determines who signed a driver package, and whether its catalogue lists the files.
//!
//! A catalogue (`.cat`) is PKCS#7 signed data around a Microsoft certificate trust list, whose
//! members contain the hashes of the files. Specifications: RFC 2315, RFC 5652; [MS-OSHARED] 2.3.2
//! for the indirect data. DER is parsed with the crate `der`; it is stricter than known catalogues
//! require, but only where that does no harm.
//!
//! The catalogue must list each file, and the signer must vouch for this list (its message digest).
//! The certificate must not be a test certificate. Not checked: the signature itself and the chain
//! up to a root. Windows does that with its own roots. The concern here is a driver that was
//! changed, or built for tests, and then stops the guest from starting.

use std::collections::{BTreeMap, BTreeSet};

use der::asn1::{AnyRef, ObjectIdentifier};
use der::{Decode, Reader, SliceReader, Tag, Tagged};
use sha2::{Digest, Sha256};

use super::authenticode;
use super::driver_source::{DriverSource, DriverSourceError};
use super::select::{DriverPackage, DriverSet};
use crate::error::Blocker;
use crate::text::guest_text;

const SIGNED_DATA: &str = "1.2.840.113549.1.7.2";
const TRUST_LIST: &str = "1.3.6.1.4.1.311.10.1";
const INDIRECT_DATA: &str = "1.3.6.1.4.1.311.2.1.4";
const MESSAGE_DIGEST: &str = "1.2.840.113549.1.9.4";
const COMMON_NAME: &str = "2.5.4.3";
const ORGANIZATION: &str = "2.5.4.10";

/// The size limit: catalogues have some ten kilobytes.
const MAX_CATALOGUE: usize = 16 << 20;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signer {
    pub name: String,
    pub issuer: String,
    self_signed: bool,
}

impl Signer {
    /// Whether the certificate was made for development: it is self-signed, or its name identifies
    /// it as a test.
    pub fn is_test(&self) -> bool {
        let says_test = |name: &str| name.to_lowercase().replace("attest", "").contains("test");
        self.self_signed || says_test(&self.name) || says_test(&self.issuer)
    }
}

/// The contents of a catalogue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    hashes: BTreeSet<Vec<u8>>,
    pub signer: Option<Signer>,
}

impl Listing {
    pub fn lists(&self, file: &[u8]) -> bool {
        authenticode::hashes(file)
            .iter()
            .any(|hash| self.hashes.contains(hash))
    }
}

fn items(bytes: &[u8]) -> Option<Vec<AnyRef<'_>>> {
    let mut reader = SliceReader::new(bytes).ok()?;
    let mut items = Vec::new();
    while !reader.is_finished() {
        items.push(AnyRef::decode(&mut reader).ok()?);
    }
    Some(items)
}

fn first(bytes: &[u8]) -> Option<AnyRef<'_>> {
    AnyRef::decode(&mut SliceReader::new(bytes).ok()?).ok()
}

/// The items of a constructed value.
fn inside<'a>(item: &AnyRef<'a>) -> Option<Vec<AnyRef<'a>>> {
    items(item.value())
}

fn is(item: Option<&AnyRef<'_>>, oid: &str) -> bool {
    item.filter(|item| item.tag() == Tag::ObjectIdentifier)
        .and_then(|item| ObjectIdentifier::from_bytes(item.value()).ok())
        .is_some_and(|found| found.to_string() == oid)
}

/// The value of an attribute: `SEQUENCE { OID, SET { value } }`.
fn attribute<'a>(attributes: &AnyRef<'a>, oid: &str) -> Option<AnyRef<'a>> {
    inside(attributes)?.iter().find_map(|attribute| {
        let parts = inside(attribute)?;
        is(parts.first(), oid).then(|| first(parts.get(1)?.value()))?
    })
}

/// Parses a catalogue; `None` if it is damaged or not one.
pub fn listing(catalogue: &[u8]) -> Option<Listing> {
    if catalogue.len() > MAX_CATALOGUE {
        return None;
    }
    let outer = inside(&first(catalogue)?)?;
    if !is(outer.first(), SIGNED_DATA) {
        return None;
    }
    let data = inside(&first(outer.get(1)?.value())?)?;
    let content = inside(data.get(2)?)?;
    if !is(content.first(), TRUST_LIST) {
        return None;
    }
    // PKCS#7 has the list itself here, CMS an octet string with it.
    let signed = first(content.get(1)?.value())?;
    let list = match signed.tag() {
        Tag::OctetString => first(signed.value())?,
        _ => signed,
    };
    let hashes = members(&list)?;
    let signers = data.iter().skip(3).rfind(|item| item.tag() == Tag::Set)?;
    let signer = match inside(signers)?.first() {
        None => None,
        Some(info) => {
            let certificates = data.iter().skip(3).find(|item| is_context(item, 0));
            Some(signer(info, certificates, signed.value())?)
        }
    };
    Some(Listing { hashes, signer })
}

fn is_context(item: &AnyRef<'_>, number: u32) -> bool {
    match item.tag() {
        Tag::ContextSpecific { number: found, .. } => found.value() == number,
        _ => false,
    }
}

/// The hashes in a trust list: in the identifier of a member (raw, or as UTF-16 digits) and in its
/// indirect data.
fn members(list: &AnyRef<'_>) -> Option<BTreeSet<Vec<u8>>> {
    let mut hashes = BTreeSet::new();
    // Usage, identifier, time, algorithm, members.
    let fields = inside(list)?;
    let Some(members) = fields.iter().filter(|f| f.tag() == Tag::Sequence).nth(2) else {
        return Some(hashes);
    };
    for member in inside(members)? {
        let fields = inside(&member)?;
        let id = fields.first()?.value();
        match id.len() {
            20 | 32 => {
                hashes.insert(id.to_vec());
            }
            _ => hashes.extend(from_digits(id)),
        }
        let Some(attributes) = fields.get(1) else {
            continue;
        };
        if let Some(data) = attribute(attributes, INDIRECT_DATA)
            && let Some(digest) = inside(&data)?.get(1)
            && let Some(hash) = inside(digest)?.get(1)
        {
            hashes.insert(hash.value().to_vec());
        }
    }
    Some(hashes)
}

fn from_digits(utf16: &[u8]) -> Option<Vec<u8>> {
    let digits: Vec<u8> = utf16
        .chunks_exact(2)
        .filter(|unit| *unit != [0, 0])
        .map(|unit| u8::try_from(u16::from_le_bytes([unit[0], unit[1]])).ok())
        .collect::<Option<_>>()?;
    if !matches!(digits.len(), 40 | 64) {
        return None;
    }
    digits
        .chunks_exact(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok())
        .collect()
}

/// The author of a signer info. `None` if it vouches for anything other than `signed`.
fn signer(info: &AnyRef<'_>, certificates: Option<&AnyRef<'_>>, signed: &[u8]) -> Option<Signer> {
    let fields = inside(info)?;
    if let Some(attributes) = fields.iter().skip(2).find(|f| is_context(f, 0))
        && let Some(digest) = attribute(attributes, MESSAGE_DIGEST)
    {
        let calculated = match digest.value().len() {
            20 => sha1_smol::Sha1::from(signed).digest().bytes().to_vec(),
            32 => Sha256::digest(signed).to_vec(),
            48 => sha2::Sha384::digest(signed).to_vec(),
            _ => sha2::Sha512::digest(signed).to_vec(),
        };
        if calculated != digest.value() {
            return None;
        }
    }
    let unknown = || Signer {
        name: "an unknown certificate".to_string(),
        issuer: String::new(),
        self_signed: false,
    };
    let id = inside(fields.get(1)?)?;
    let certificates = match certificates {
        Some(certificates) => inside(certificates)?,
        None => Vec::new(),
    };
    let found = certificates
        .iter()
        .find_map(|certificate| certificate_of(certificate, &id));
    Some(found.unwrap_or_else(unknown))
}

/// The names in a certificate, if it has this issuer and serial number.
fn certificate_of(certificate: &AnyRef<'_>, id: &[AnyRef<'_>]) -> Option<Signer> {
    let body = inside(inside(certificate)?.first()?)?;
    let skip = usize::from(is_context(body.first()?, 0));
    let (serial, issuer, subject) = (body.get(skip)?, body.get(skip + 2)?, body.get(skip + 4)?);
    let [id_issuer, id_serial] = id else {
        return None;
    };
    (id_issuer == issuer && id_serial == serial).then(|| Signer {
        name: name(subject).unwrap_or_else(|| "a certificate without a name".to_string()),
        issuer: name(issuer).unwrap_or_default(),
        self_signed: subject == issuer,
    })
}

/// The common name of a distinguished name, or its organisation.
fn name(name: &AnyRef<'_>) -> Option<String> {
    let parts = inside(name)?;
    let of = |oid: &str| {
        parts.iter().find_map(|part| {
            let pair = inside(&first(part.value())?)?;
            is(pair.first(), oid).then(|| pair.get(1).copied())?
        })
    };
    let value = of(COMMON_NAME).or_else(|| of(ORGANIZATION))?;
    let text = match value.tag() {
        Tag::BmpString => {
            let units: Vec<u16> = value
                .value()
                .chunks_exact(2)
                .map(|b| u16::from_be_bytes([b[0], b[1]]))
                .collect();
            String::from_utf16_lossy(&units)
        }
        _ => String::from_utf8_lossy(value.value()).into_owned(),
    };
    guest_text(&text)
}

/// A reason why Windows may not load a driver.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum SignatureFault {
    NoCatalogue,
    Damaged,
    Unsigned,
    NotListed { file: String },
    TestSigned { signer: String },
}

impl SignatureFault {
    fn text(&self) -> String {
        match self {
            SignatureFault::NoCatalogue => "no catalogue (.cat) in the driver package".to_string(),
            SignatureFault::Damaged => "the catalogue (.cat) cannot be read".to_string(),
            SignatureFault::Unsigned => "the catalogue (.cat) is not signed".to_string(),
            SignatureFault::NotListed { file } => {
                format!(
                    "{file} is not what the catalogue (.cat) lists: it was changed after signing"
                )
            }
            SignatureFault::TestSigned { signer } => format!("test-signed by {signer}"),
        }
    }
}

/// The signatures of the chosen packages.
#[derive(Debug, Default)]
pub struct Review {
    /// The signer of each driver.
    pub signers: BTreeMap<String, String>,
    /// The drivers with each fault: one line per fault.
    pub faults: BTreeMap<SignatureFault, Vec<String>>,
}

impl Review {
    pub fn warnings(&self) -> impl Iterator<Item = String> {
        self.faults.iter().map(|(fault, drivers)| {
            format!(
                "{}: {}; Windows loads such drivers only in test mode (stop 0x7B otherwise)",
                drivers.join(", "),
                fault.text()
            )
        })
    }

    pub fn blockers(&self) -> impl Iterator<Item = Blocker> {
        self.faults.iter().map(|(fault, drivers)| {
            Blocker::new(
                "driver-signature",
                format!("{}: {}", drivers.join(", "), fault.text()),
                "use the signed virtio-win ISO, or leave out --require-signed",
            )
        })
    }
}

/// Checks every package of the set.
pub fn review(
    drivers: &DriverSet,
    driver_source: &dyn DriverSource,
) -> Result<Review, DriverSourceError> {
    let mut review = Review::default();
    for package in &drivers.packages {
        match check(package, driver_source)? {
            Ok(signer) => {
                review.signers.insert(package.driver.clone(), signer);
            }
            Err(fault) => review
                .faults
                .entry(fault)
                .or_default()
                .push(package.driver.clone()),
        }
    }
    Ok(review)
}

fn check(
    package: &DriverPackage,
    driver_source: &dyn DriverSource,
) -> Result<Result<String, SignatureFault>, DriverSourceError> {
    let files = package.store_files();
    let catalogue = package.inf.catalog.as_deref().and_then(|name| {
        package
            .files
            .iter()
            .find(|f| f.name.eq_ignore_ascii_case(name))
    });
    let Some(catalogue) = catalogue else {
        return Ok(Err(SignatureFault::NoCatalogue));
    };
    let Some(listing) = listing(&driver_source.read(&catalogue.path_in_source)?) else {
        return Ok(Err(SignatureFault::Damaged));
    };
    // The files that Windows checks before it loads a driver: the INF and the images.
    for file in files {
        let lower = file.name.to_lowercase();
        if (lower.ends_with(".sys") || lower.ends_with(".inf"))
            && !listing.lists(&driver_source.read(&file.path_in_source)?)
        {
            let file = file.name.clone();
            return Ok(Err(SignatureFault::NotListed { file }));
        }
    }
    Ok(match listing.signer {
        None => Err(SignatureFault::Unsigned),
        Some(signer) if signer.is_test() => Err(SignatureFault::TestSigned {
            signer: signer.name,
        }),
        Some(signer) => Ok(signer.name),
    })
}

/// The signer of a package's catalogue, whether the signature is valid or not. Windows records it
/// beside a package it has installed.
pub fn catalogue_signer(package: &DriverPackage, files: &[(String, Vec<u8>)]) -> Option<String> {
    let name = package.inf.catalog.as_deref()?;
    let (_, bytes) = files
        .iter()
        .find(|(file, _)| file.eq_ignore_ascii_case(name))?;
    let signer = listing(bytes)?.signer?;
    // A signer without a certificate has no name.
    (!signer.issuer.is_empty()).then_some(signer.name)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;
    use std::sync::OnceLock;

    use super::*;
    use crate::demo::{Arch, cat, pe};
    use crate::tool::Cmd;

    const INF: &[u8] = b"[Version]\r\n";

    fn image() -> Vec<u8> {
        pe::image(Arch::Amd64, pe::Subsystem::Native)
    }

    #[test]
    fn unsigned_listing() {
        let image = image();
        let bytes = cat::unsigned(&[INF, &image]);
        let found = listing(&bytes).unwrap();
        assert_eq!(found.signer, None);
        assert!(found.lists(INF) && found.lists(&image));
        assert!(!found.lists(b"[version]\r\n"));
        for end in 0..bytes.len() {
            assert_eq!(listing(&bytes[..end]), None, "cut off at {end}");
        }
        assert_eq!(listing(b"stands for a catalogue"), None);
    }

    #[test]
    fn identifiers_of_old_catalogues() {
        let digits: String = "0a".repeat(20) + "\0";
        let utf16: Vec<u8> = digits.encode_utf16().flat_map(u16::to_le_bytes).collect();
        assert_eq!(from_digits(&utf16), Some(vec![10; 20]));
        assert_eq!(from_digits(&utf16[..60]), None);
        assert_eq!(from_digits(&[b'x', 0].repeat(40)), None);
    }

    /// One key for all certificates: its creation takes longer than everything else.
    fn rsa_key() -> &'static [u8] {
        static KEY: OnceLock<Vec<u8>> = OnceLock::new();
        let make = ["genpkey", "-algorithm", "RSA"];
        KEY.get_or_init(|| Cmd::new("openssl").args(make).run().unwrap().stdout)
    }

    /// A catalogue that OpenSSL signed with a certificate of this name, from an authority or
    /// self-signed.
    fn signed(dir: &Path, name: &str, authority: Option<&str>) -> Vec<u8> {
        let file = |name: &str| dir.join(name).to_str().unwrap().to_string();
        let (key, ca_file, leaf) = (file("key"), file("ca.pem"), file("leaf.pem"));
        fs::write(&key, rsa_key()).unwrap();
        let new = |name: &str, certificate: &str, ca: &[&str]| {
            let subject = format!("/O=Demo/CN={name}");
            let args = [
                "req",
                "-x509",
                "-key",
                &key,
                "-subj",
                &subject,
                "-out",
                certificate,
            ];
            Cmd::new("openssl").args(args).args(ca).run().unwrap();
        };
        let mut ca = Vec::new();
        if let Some(authority) = authority {
            new(authority, &ca_file, &[]);
            ca = vec!["-CA", &ca_file, "-CAkey", &key];
        }
        new(name, &leaf, &ca);
        fs::write(file("list"), cat::trust_list(&[INF, &image()])).unwrap();
        Cmd::new("openssl")
            .args(["cms", "-sign", "-binary", "-nodetach", "-outform", "DER"])
            .args(["-econtent_type", TRUST_LIST, "-md", "sha256"])
            .args(["-in", &file("list"), "-out", &file("cat")])
            .args(["-signer", &leaf, "-inkey", &key])
            .run()
            .unwrap();
        fs::read(file("cat")).unwrap()
    }

    #[test]
    fn signers() {
        if !crate::skip::have(&["openssl"]) {
            return;
        }
        let cases = [
            ("Red Hat, Inc.", Some("DigiCert Code Signing"), false),
            ("Attestation Publisher", Some("Root"), false),
            ("Someone", None, true),
            ("WDKTestCert user", Some("Root"), true),
            ("Publisher", Some("Testing Root"), true),
        ];
        for (name, authority, test) in cases {
            let dir = tempfile::tempdir().unwrap();
            let bytes = signed(dir.path(), name, authority);
            let found = listing(&bytes).unwrap();
            assert!(found.lists(&image()) && found.lists(INF));
            let signer = found.signer.unwrap();
            assert_eq!(signer.name, name);
            assert_eq!(signer.issuer, authority.unwrap_or(name));
            assert_eq!(signer.is_test(), test, "{name}");
            // The signer does not vouch for a hash that was added later.
            let hash = authenticode::member_hash(INF);
            let at = bytes.windows(32).position(|w| w == hash).unwrap();
            let mut changed = bytes;
            changed[at] ^= 1;
            assert_eq!(listing(&changed), None);
        }
    }

    /// The signer that Windows would record beside the package, test certificates included.
    #[test]
    fn the_signer_of_a_package_is_recorded() {
        use crate::demo::virtio_win::{self, Layout};
        use crate::drivers::driver_source::Memory;
        use crate::drivers::package::{Placement, install};
        use crate::drivers::{Catalogue, WindowsTarget, select};
        use crate::guest::GuestPath;
        use crate::registry::{RegData, RegOp};

        if !crate::skip::have(&["openssl"]) {
            return;
        }
        let target = WindowsTarget {
            major: 10,
            minor: 0,
            build: 19045,
            arch: Arch::Amd64,
            server: false,
        };
        let driver_source = Memory::new(virtio_win::files(Layout::Iso, &|_| image()));
        let set = select::select(&driver_source, &Catalogue::builtin(), &target).unwrap();
        let windows = GuestPath::parse("\\Windows").unwrap();
        let placement = Placement::new(crate::types::ControlSet::new(1), windows, 5).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let signed = |name| signed(dir.path(), name, Some("Root"));
        for (catalogue, signer) in [
            (signed("Red Hat, Inc."), Some("Red Hat, Inc.")),
            (signed("WDKTestCert user"), Some("WDKTestCert user")),
            (cat::unsigned(&[INF]), None),
            (b"no catalogue".to_vec(), None),
        ] {
            let mut package = set.package("viostor").unwrap().clone();
            let files = [(package.inf.catalog.clone().unwrap(), catalogue)];
            package.signer = catalogue_signer(&package, &files);
            let ops = install(&package, "0123456789abcdef", &target, &placement).unwrap();
            let recorded: Vec<_> = ops
                .system
                .iter()
                .filter_map(|op| match op {
                    RegOp::Set { name, data, .. } if name == "SignerName" => Some(data.clone()),
                    _ => None,
                })
                .collect();
            let wanted = signer.map(|name| RegData::Sz(name.into()));
            assert_eq!(recorded, Vec::from_iter(wanted));
        }
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_survived(
            at in 0usize..300,
            bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..30),
        ) {
            let mut catalogue = cat::unsigned(&[INF, &image()]);
            let end = (at + bytes.len()).min(catalogue.len());
            catalogue.splice(at.min(end)..end, bytes.clone());
            let _ = listing(&catalogue);
            let _ = listing(&bytes);
        }
    }
}

#[cfg(test)]
#[path = "signature_tests.rs"]
mod review_tests;
