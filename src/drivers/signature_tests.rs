//! Signers and packages without a tool: what is read of a signature is made byte by byte.

use super::*;
use crate::demo::cat::{self, Certificate};
use crate::drivers::driver_source::Memory;
use crate::drivers::{Catalogue, WindowsTarget, select};
use crate::testing::driver_source;
use crate::types::Arch;

const UTF8: u8 = 0x0c;
const BMP: u8 = 0x1e;
const FILE: &[u8] = b"[Version]\r\n";

type Name = &'static [(&'static str, u8, &'static str)];

const RED_HAT: Name = &[
    (ORGANIZATION, UTF8, "Red Hat"),
    (COMMON_NAME, UTF8, "Red Hat, Inc."),
];
const ROOT: Name = &[(COMMON_NAME, UTF8, "Root")];

fn sha256(bytes: &[u8]) -> Vec<u8> {
    Sha256::digest(bytes).to_vec()
}

fn certificate(serial: u8, subject: Name, issuer: Name) -> Certificate<'static> {
    Certificate {
        serial,
        subject,
        issuer,
    }
}

fn signer_of(files: &[&[u8]], subject: Name, issuer: Name) -> Vec<u8> {
    let one = certificate(1, subject, issuer);
    cat::signed(files, &[one], &one, sha256)
}

#[test]
fn a_signer_is_named_by_its_certificate_and_a_test_certificate_is_told() {
    for (subject, issuer, name, test) in [
        (RED_HAT, ROOT, "Red Hat, Inc.", false),
        (ROOT, ROOT, "Root", true),
        (
            &[(COMMON_NAME, UTF8, "WDKTestCert user")],
            ROOT,
            "WDKTestCert user",
            true,
        ),
        (
            RED_HAT,
            &[(COMMON_NAME, UTF8, "TESTING Root")],
            "Red Hat, Inc.",
            true,
        ),
        (
            &[(COMMON_NAME, UTF8, "Attestation")],
            ROOT,
            "Attestation",
            false,
        ),
        (&[(COMMON_NAME, BMP, "Ä GmbH")], ROOT, "Ä GmbH", false),
        (&[(ORGANIZATION, UTF8, "Only Ltd")], ROOT, "Only Ltd", false),
        (&[], ROOT, "a certificate without a name", false),
    ] as [(Name, Name, &str, bool); 8]
    {
        let found = listing(&signer_of(&[FILE], subject, issuer)).unwrap();
        assert!(found.lists(FILE) && !found.lists(b"other"));
        let signer = found.signer.unwrap();
        assert_eq!(signer.name, name);
        assert_eq!(signer.is_test(), test, "{name}");
    }
}

/// Of several certificates the one with the issuer and the serial number that the signer info names.
#[test]
fn the_certificate_is_told_by_issuer_and_serial_number() {
    let list = [
        certificate(1, ROOT, ROOT),
        certificate(2, ROOT, RED_HAT),
        certificate(2, RED_HAT, ROOT),
    ];
    let name = |by: &Certificate<'_>| {
        let found = listing(&cat::signed(&[FILE], &list, by, sha256)).unwrap();
        let signer = found.signer.unwrap();
        (signer.name.clone(), signer.is_test())
    };
    assert_eq!(name(&list[0]), ("Root".into(), true));
    assert_eq!(name(&list[1]), ("Root".into(), false));
    assert_eq!(name(&list[2]), ("Red Hat, Inc.".into(), false));
    let unknown = certificate(3, RED_HAT, ROOT);
    assert_eq!(name(&unknown), ("an unknown certificate".into(), false));
}

#[test]
fn a_signer_vouches_for_this_list_by_whatever_digest() {
    type Digest = fn(&[u8]) -> Vec<u8>;
    let one = certificate(1, RED_HAT, ROOT);
    for digest in [
        (|bytes| sha1_smol::Sha1::from(bytes).digest().bytes().to_vec()) as Digest,
        sha256,
        |bytes| sha2::Sha384::digest(bytes).to_vec(),
        |bytes| sha2::Sha512::digest(bytes).to_vec(),
    ] {
        let good = cat::signed(&[FILE], &[one], &one, digest);
        assert!(listing(&good).unwrap().signer.is_some());
        let of_other = |bytes: &[u8]| digest(&bytes[1..]);
        assert_eq!(listing(&cat::signed(&[FILE], &[one], &one, of_other)), None);
    }
}

const WINDOWS_10: WindowsTarget = WindowsTarget {
    major: 10,
    minor: 0,
    build: 19045,
    arch: Arch::Amd64,
    server: false,
};

/// The packages of a driver source whose viostor has this catalogue, and the driver `change`d.
fn reviewed(catalogue: impl Fn(&[&[u8]]) -> Vec<u8>, change: fn(&mut DriverPackage)) -> Review {
    let source = driver_source();
    let mut set = select::select(&source, &Catalogue::builtin(), &WINDOWS_10).unwrap();
    let package = set
        .packages
        .iter_mut()
        .find(|p| p.driver == "viostor")
        .unwrap();
    let contents = |end: &str| {
        let file = package
            .files
            .iter()
            .find(|f| f.name.ends_with(end))
            .unwrap();
        source.read(&file.path_in_source).unwrap()
    };
    let catalogue = catalogue(&[&contents(".inf"), &contents(".sys")]);
    let name = package
        .files
        .iter()
        .find(|f| f.name.ends_with(".cat"))
        .unwrap();
    let name = name.path_in_source.clone();
    let changed = source.files().iter().map(|f| {
        let bytes = match f.path == name {
            true => catalogue.clone(),
            false => source.read(&f.path).unwrap(),
        };
        (f.path.clone(), bytes)
    });
    let source = Memory::new(changed);
    change(package);
    review(&set, &source).unwrap()
}

#[test]
fn a_package_is_in_order_when_a_real_signer_lists_its_inf_and_its_images() {
    let fault = |catalogue: &dyn Fn(&[&[u8]]) -> Vec<u8>, change: fn(&mut DriverPackage)| {
        let review = reviewed(catalogue, change);
        let mut faults = review.faults.iter();
        let found = faults.find(|(_, drivers)| drivers.iter().any(|d| d == "viostor"));
        let signer = review.signers.get("viostor").cloned();
        assert_ne!(found.is_some(), signer.is_some());
        (found.map(|(fault, _)| fault.clone()), signer)
    };
    let real = |files: &[&[u8]]| signer_of(files, RED_HAT, ROOT);
    assert_eq!(fault(&real, |_| {}), (None, Some("Red Hat, Inc.".into())));
    let none = |fault| (Some(fault), None);
    let test: &dyn Fn(&[&[u8]]) -> Vec<u8> = &|files| signer_of(files, ROOT, ROOT);
    let signer = "Root".to_string();
    assert_eq!(
        fault(test, |_| {}),
        none(SignatureFault::TestSigned { signer })
    );
    assert_eq!(
        fault(&cat::unsigned, |_| {}),
        none(SignatureFault::Unsigned)
    );
    let damaged: &dyn Fn(&[&[u8]]) -> Vec<u8> = &|_| b"x".to_vec();
    assert_eq!(fault(damaged, |_| {}), none(SignatureFault::Damaged));
    for (left, file) in [(1, "viostor.inf"), (0, "viostor.sys")] {
        let half = |files: &[&[u8]]| signer_of(&files[left..=left], RED_HAT, ROOT);
        let file = file.to_string();
        assert_eq!(
            fault(&half, |_| {}),
            none(SignatureFault::NotListed { file })
        );
    }
    // What lies beside the package is not loaded.
    let beside: fn(&mut DriverPackage) = |p| {
        let mut more = p.files[0].clone();
        more.name = "beside.sys".into();
        p.files.push(more);
    };
    let signer = Some("Red Hat, Inc.".to_string());
    assert_eq!(fault(&real, beside), (None, signer));
    // Without a line in the INF, and without the file.
    let missing = none(SignatureFault::NoCatalogue);
    assert_eq!(fault(&real, |p| p.inf.catalog = None), missing);
    assert_eq!(
        fault(&real, |p| p.files.retain(|f| !f.name.ends_with(".cat"))),
        missing
    );
}

/// One line for each fault, with the drivers that have it.
#[test]
fn faults_are_told_as_warnings_or_blockers() {
    let review = reviewed(cat::unsigned, |_| {});
    let warnings: Vec<_> = review.warnings().collect();
    let blockers: Vec<_> = review.blockers().collect();
    assert_eq!(warnings.len(), review.faults.len());
    for ((fault, drivers), (warning, blocker)) in
        review.faults.iter().zip(warnings.iter().zip(&blockers))
    {
        let said = format!("{}: {}", drivers.join(", "), fault.text());
        assert!(
            warning.starts_with(&said) && warning.contains("test mode"),
            "{warning}"
        );
        assert_eq!(
            (&*blocker.code, &*blocker.reason),
            ("driver-signature", &*said)
        );
    }
    let all = [
        SignatureFault::NoCatalogue,
        SignatureFault::Damaged,
        SignatureFault::Unsigned,
        SignatureFault::NotListed {
            file: "x.sys".into(),
        },
        SignatureFault::TestSigned {
            signer: "Root".into(),
        },
    ];
    let texts: BTreeSet<String> = all.iter().map(SignatureFault::text).collect();
    assert_eq!(texts.len(), all.len());
    assert!(texts.contains("test-signed by Root"));
    assert!(
        texts
            .iter()
            .any(|text| text.starts_with("x.sys is not what"))
    );
}

#[test]
fn what_is_said_of_each_fault() {
    for (fault, text) in [
        (
            SignatureFault::NoCatalogue,
            "no catalogue (.cat) in the driver package",
        ),
        (
            SignatureFault::Damaged,
            "the catalogue (.cat) cannot be read",
        ),
        (
            SignatureFault::Unsigned,
            "the catalogue (.cat) is not signed",
        ),
        (
            SignatureFault::NotListed {
                file: "x.sys".into(),
            },
            "x.sys is not what the catalogue (.cat) lists: it was changed after signing",
        ),
        (
            SignatureFault::TestSigned { signer: "T".into() },
            "test-signed by T",
        ),
    ] {
        let mut review = Review::default();
        let drivers = vec!["a".to_string(), "b".to_string()];
        review.faults.insert(fault, drivers);
        assert_eq!(
            review.warnings().collect::<Vec<_>>(),
            [format!(
                "a, b: {text}; Windows loads such drivers only in test mode (stop 0x7B otherwise)"
            )]
        );
        assert_eq!(
            review.blockers().collect::<Vec<_>>(),
            [Blocker::new(
                "driver-signature",
                format!("a, b: {text}"),
                "use the signed virtio-win ISO, or leave out --require-signed",
            )]
        );
    }
}

/// Windows records the name on the catalogue, valid or not, but none that is made up here.
#[test]
fn the_signer_of_a_package_is_the_one_its_catalogue_names() {
    let set = select::select(&driver_source(), &Catalogue::builtin(), &WINDOWS_10).unwrap();
    let package = set.package("viostor").unwrap();
    let one = certificate(1, RED_HAT, ROOT);
    let other = certificate(2, ROOT, ROOT);
    for (name, catalogue, expected) in [
        (
            "VIOSTOR.CAT",
            signer_of(&[FILE], RED_HAT, ROOT),
            Some("Red Hat, Inc."),
        ),
        ("viostor.cat", signer_of(&[FILE], ROOT, ROOT), Some("Root")),
        ("other.cat", signer_of(&[FILE], RED_HAT, ROOT), None),
        ("viostor.cat", cat::unsigned(&[FILE]), None),
        ("viostor.cat", b"x".to_vec(), None),
        // The certificate of the signer is not among those in the catalogue.
        (
            "viostor.cat",
            cat::signed(&[FILE], &[other], &one, sha256),
            None,
        ),
    ] {
        let files = [
            ("viostor.sys".to_string(), Vec::new()),
            (name.to_string(), catalogue),
        ];
        let found = catalogue_signer(package, &files);
        assert_eq!(found.as_deref(), expected, "{name}");
    }
    let mut without = package.clone();
    without.inf.catalog = None;
    let files = [("viostor.cat".to_string(), signer_of(&[FILE], RED_HAT, ROOT))];
    assert_eq!(catalogue_signer(&without, &files), None);
}

/// Old catalogues name a member by the digits of its SHA-1.
#[test]
fn digits_are_a_hash_of_one_of_two_lengths() {
    let utf16 = |text: &str| {
        text.encode_utf16()
            .flat_map(u16::to_le_bytes)
            .collect::<Vec<_>>()
    };
    for (text, bytes) in [
        ("0A".repeat(20), Some(vec![10; 20])),
        ("ff".repeat(32), Some(vec![255; 32])),
        ("0a".repeat(19), None),
        ("0a".repeat(33), None),
        ("0g".repeat(20), None),
        ("\u{130}a".repeat(20), None),
    ] {
        assert_eq!(from_digits(&utf16(&text)), bytes, "{text}");
    }
    // A file may be longer than its contents.
    let mut largest = cat::unsigned(&[FILE]);
    largest.resize(MAX_CATALOGUE, 0);
    assert!(listing(&largest).is_some());
    largest.push(0);
    assert_eq!(listing(&largest), None);
    // Signed data about something else is no catalogue.
    let mut other = cat::unsigned(&[FILE]);
    let list = ObjectIdentifier::new_unwrap(TRUST_LIST);
    let list = list.as_bytes();
    let at = other.windows(list.len()).position(|w| w == list).unwrap();
    other[at + list.len() - 1] += 1;
    assert_eq!(listing(&other), None);
}

/// A member is named by its identifier and by its indirect data; either is enough.
#[test]
fn a_hash_counts_wherever_a_member_has_it() {
    let whole = cat::unsigned(&[FILE]);
    let hash = sha256(FILE);
    let places: Vec<usize> = (0..whole.len())
        .filter(|at| whole[*at..].starts_with(&hash))
        .collect();
    assert_eq!(places.len(), 2);
    for (spoilt, listed) in [
        (&places[..0], true),
        (&places[..1], true),
        (&places[1..], true),
        (&places[..], false),
    ] {
        let mut catalogue = whole.clone();
        spoilt.iter().for_each(|at| catalogue[*at] ^= 1);
        assert_eq!(
            listing(&catalogue).unwrap().lists(FILE),
            listed,
            "{spoilt:?}"
        );
    }
}

/// Names of files are those of Windows, in any case.
#[test]
fn the_files_of_a_package_are_checked_whatever_the_case_of_their_names() {
    for (left, file) in [(1, "VIOSTOR.INF"), (0, "VIOSTOR.SYS")] {
        let half = |files: &[&[u8]]| signer_of(&files[left..=left], RED_HAT, ROOT);
        let review = reviewed(half, |package| {
            for file in &mut package.files {
                file.name = file.name.to_uppercase();
            }
        });
        let fault = SignatureFault::NotListed { file: file.into() };
        assert_eq!(review.faults.get(&fault).unwrap(), &["viostor"], "{file}");
    }
}
