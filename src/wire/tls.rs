//! Certificates: always verified, against the system's authorities, those of `--tls-ca`, or by the
//! digest of the server's own certificate (`--tls-fingerprint`).
//!
//! ESXi and many a NAS have a self-signed certificate. In `--tls-ca` such a one is trusted for
//! itself: exactly that certificate, for a name in it.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use der::Decode;
use der::asn1::{AnyRef, BitStringRef, ObjectIdentifier, UintRef};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
};
use sha2::{Digest, Sha256};

use super::Access;
use super::error::{Result, WireError};
use crate::text::hex;

/// The verification of certificates, and the fault of the last one.
#[derive(Debug)]
pub(super) struct Trust {
    authorities: Option<Arc<WebPkiServerVerifier>>,
    /// Certificates that are trusted for themselves.
    own: Vec<CertificateDer<'static>>,
    pin: Option<[u8; 32]>,
    provider: Arc<CryptoProvider>,
    /// The requirement for a certificate, in words.
    expected: String,
    refused: Mutex<Option<Refused>>,
}

/// The reason why a handshake will fail.
#[derive(Debug)]
enum Refused {
    /// The certificate's fingerprint, and its fault.
    Certificate(String, String),
    /// The certificate is valid, but the server's signature with its key is not accepted, for this
    /// reason.
    Key(String),
}

/// The shortest RSA key that `ring` accepts.
const LEAST_RSA: usize = 2048;
const RSA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.1");

/// The length of a certificate's key if it is RSA.
fn rsa_bits(certificate: &CertificateDer<'_>) -> Option<usize> {
    let info = ParsedCertificate::try_from(certificate).ok()?;
    let info = info.subject_public_key_info();
    let key = AnyRef::from_der(info.as_ref()).ok()?.sequence(|info| {
        let kind = AnyRef::decode(info)?.sequence(|kind| {
            let oid = ObjectIdentifier::decode(kind)?;
            AnyRef::decode(kind)?;
            Ok::<_, der::Error>(oid)
        })?;
        let key = BitStringRef::decode(info)?;
        Ok::<_, der::Error>((kind == RSA).then_some(key))
    });
    let key = key.ok()??.raw_bytes();
    let modulus = AnyRef::from_der(key).ok()?.sequence(|numbers| {
        let modulus = UintRef::decode(numbers)?;
        UintRef::decode(numbers)?;
        Ok::<_, der::Error>(modulus)
    });
    Some(modulus.ok()?.as_bytes().len() * 8)
}

fn fingerprint(certificate: &[u8]) -> String {
    format!("sha256:{}", hex(&Sha256::digest(certificate)))
}

/// Parses `sha256:HEX`, with colons or without, as browsers and openssl print it.
pub(super) fn parse_pin(text: &str) -> Result<[u8; 32]> {
    let refuse = || {
        WireError::usage(
            format!("--tls-fingerprint {text} is not sha256: and 64 hexadecimal digits"),
            "openssl s_client -connect HOST:443 </dev/null | openssl x509 -noout -fingerprint -sha256",
        )
    };
    let lower = text.to_ascii_lowercase();
    let digits: String = lower
        .strip_prefix("sha256:")
        .ok_or_else(refuse)?
        .chars()
        .filter(|c| *c != ':')
        .collect();
    if digits.len() != 64 || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(refuse());
    }
    let mut pin = [0; 32];
    for (byte, pair) in pin.iter_mut().zip(digits.as_bytes().chunks(2)) {
        let pair = str::from_utf8(pair).map_err(|_| refuse())?;
        *byte = u8::from_str_radix(pair, 16).map_err(|_| refuse())?;
    }
    Ok(pin)
}

fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let refuse = |reason: &dyn std::fmt::Display| {
        WireError::usage(
            format!("reading certificates of {}: {reason}", file.display()),
            "--tls-ca names a file of certificates in PEM form",
        )
    };
    let text = std::fs::read(file).map_err(|e| refuse(&e))?;
    let read: std::result::Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    let read = read.map_err(|e| refuse(&format!("{e:?}")))?;
    if read.is_empty() {
        return Err(refuse(&"it has none"));
    }
    Ok(read)
}

impl Trust {
    /// Reads the files in the options, before they are out of reach.
    pub(super) fn new(access: &Access) -> Result<Arc<Self>> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut trust = Self {
            authorities: None,
            own: Vec::new(),
            pin: None,
            provider: provider.clone(),
            expected: String::new(),
            refused: Mutex::new(None),
        };
        if let Some(pin) = &access.tls_fingerprint {
            let pin = parse_pin(pin)?;
            trust.expected = format!("sha256:{}", hex(&pin));
            trust.pin = Some(pin);
            return Ok(Arc::new(trust));
        }
        let mut roots = RootCertStore::empty();
        match &access.tls_ca {
            Some(file) => {
                trust.own = certificates(file)?;
                let first = fingerprint(&trust.own[0]);
                trust.expected = format!("one signed by those of {} ({first})", file.display());
                roots.add_parsable_certificates(trust.own.iter().cloned());
            }
            None => {
                trust.expected = "one signed by an authority that this host trusts".into();
                let system = rustls_native_certs::load_native_certs();
                roots.add_parsable_certificates(system.certs);
            }
        }
        if !roots.is_empty() {
            let built = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider);
            let built = built.build();
            trust.authorities = Some(built.map_err(|e| WireError::usage(e.to_string(), ""))?);
        }
        Ok(Arc::new(trust))
    }

    pub(super) fn config(self: &Arc<Self>) -> Result<Arc<ClientConfig>> {
        let config = ClientConfig::builder_with_provider(self.provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|e| WireError::usage(e.to_string(), ""))?
            .dangerous()
            .with_custom_certificate_verifier(self.clone())
            .with_no_client_auth();
        Ok(Arc::new(config))
    }

    /// The fault of the certificate after a handshake has failed because of it.
    pub(super) fn refusal(&self, at: &dyn std::fmt::Display) -> Option<WireError> {
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        let at = at.to_string();
        Some(match refused.take()? {
            Refused::Certificate(shown, reason) => WireError::Untrusted {
                at,
                shown: format!("a certificate with {shown} ({reason})"),
                expected: self.expected.clone(),
                hint: format!(
                    "compare with what the server itself shows; when it is right, --tls-fingerprint {shown}, \
                     or --tls-ca FILE with the authority that signed it"
                ),
            },
            Refused::Key(reason) => WireError::Denied {
                at,
                reason,
                hint: "give the server a certificate with a key of RSA of 2048 bits or more, or of ECDSA (ESXi: \
                       /sbin/generate-certificates, and a restart of hostd), or read the disk by ssh://"
                    .into(),
            },
        })
    }

    /// Records a signature that is not accepted: no option can make it valid.
    fn signed(
        &self,
        certificate: &CertificateDer<'_>,
        verified: std::result::Result<HandshakeSignatureValid, rustls::Error>,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verified.inspect_err(|error| {
            let shown = fingerprint(certificate);
            let reason = match rsa_bits(certificate).filter(|bits| *bits < LEAST_RSA) {
                Some(bits) => format!("its certificate ({shown}) has an RSA key of {bits} bits, too short to be accepted"),
                None => format!("what it signs with the key of its certificate ({shown}) is not accepted ({error})"),
            };
            let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
            *refused = Some(Refused::Key(reason));
        })
    }

    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        now: UnixTime,
    ) -> std::result::Result<(), rustls::Error> {
        if let Some(pin) = self.pin {
            return match Sha256::digest(leaf) == pin {
                true => Ok(()),
                false => Err(CertificateError::ApplicationVerificationFailure.into()),
            };
        }
        if self.own.iter().any(|own| own == leaf) {
            let parsed = ParsedCertificate::try_from(leaf)?;
            return rustls::client::verify_server_name(&parsed, name);
        }
        match &self.authorities {
            Some(authorities) => authorities
                .verify_server_cert(leaf, chain, name, &[], now)
                .map(drop),
            None => Err(CertificateError::UnknownIssuer.into()),
        }
    }
}

impl ServerCertVerifier for Trust {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        let verified = self.verify(leaf, chain, name, now);
        if let Err(error) = &verified {
            let reason = match self.pin {
                Some(_) => "not the one named by --tls-fingerprint".to_owned(),
                None => error.to_string(),
            };
            let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
            *refused = Some(Refused::Certificate(fingerprint(leaf), reason));
        }
        verified.map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        let known = &self.provider.signature_verification_algorithms;
        let verified = verify_tls12_signature(message, certificate, signature, known);
        self.signed(certificate, verified)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        let known = &self.provider.signature_verification_algorithms;
        let verified = verify_tls13_signature(message, certificate, signature, known);
        self.signed(certificate, verified)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}
