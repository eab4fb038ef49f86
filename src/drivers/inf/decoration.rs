//! Selects among several decorated sections the one for this Windows.
//!
//! Follows Microsoft's "INF Manufacturer Section" and "Combining platform extensions with operating
//! system versions": `NT[arch][.[major][.[minor][.[product type][.[suite mask][.[build]]]]]]`. A
//! decoration matches if everything it names matches. Among those, the highest version has
//! precedence, then the one with product type or suite.
//!
//! Since Server 2003 SP1, a models section without architecture counts for x86 only. The suite mask
//! of a guest is unknown offline, so a decoration with one never matches.

use super::super::target::{Arch, WindowsTarget};

const PRODUCT_WORKSTATION: u32 = 1;
const PRODUCT_DOMAIN_CONTROLLER: u32 = 2;
const PRODUCT_SERVER: u32 = 3;

/// The rank of a match; greater is better. `None`: no match.
pub type Rank = (u32, u32, u32, bool, bool);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Models sections: no architecture means x86.
    Models,
    /// Install sections: no architecture means any.
    Install,
}

/// Ranks the text after the dot of a section name, such as `NTamd64.10.0...16299`.
pub fn rank(decoration: &str, target: &WindowsTarget, kind: Kind) -> Option<Rank> {
    let lower = decoration.trim().to_ascii_lowercase();
    let mut parts = lower.strip_prefix("nt")?.split('.');
    let arch = parts.next().unwrap_or_default();
    let arch_fits = match arch {
        "" => kind == Kind::Install || target.arch == Arch::X86,
        name => name == target.arch.inf_name(),
    };
    if !arch_fits {
        return None;
    }
    let mut number = || -> Option<Option<u32>> {
        match parts.next().map(str::trim) {
            None | Some("") => Some(None),
            Some(text) => parse_number(text).map(Some),
        }
    };
    let (major, minor, product, suite, build) =
        (number()?, number()?, number()?, number()?, number()?);
    let version = (major.unwrap_or(0), minor.unwrap_or(0), build.unwrap_or(0));
    let here = (target.major, target.minor);
    let fits = match (version.0, version.1).cmp(&here) {
        std::cmp::Ordering::Less => true,
        std::cmp::Ordering::Equal => version.2 <= target.build,
        std::cmp::Ordering::Greater => false,
    };
    let product_fits = match product {
        None => true,
        Some(PRODUCT_WORKSTATION) => !target.server,
        Some(PRODUCT_DOMAIN_CONTROLLER | PRODUCT_SERVER) => target.server,
        Some(_) => false,
    };
    let suite_fits = matches!(suite, None | Some(0));
    (fits && product_fits && suite_fits).then_some((
        version.0,
        version.1,
        version.2,
        product.is_some(),
        !arch.is_empty(),
    ))
}

/// Decimal or `0x` hexadecimal.
pub fn parse_number(text: &str) -> Option<u32> {
    let text = text.trim();
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => u32::from_str_radix(hex, 16).ok(),
        None => text
            .parse()
            .ok()
            .or_else(|| text.parse::<i32>().ok().map(|n| n as u32)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(text: &str, arch: Arch, server: bool) -> WindowsTarget {
        let n: Vec<u32> = text.split('.').map(|p| p.parse().unwrap()).collect();
        WindowsTarget {
            major: n[0],
            minor: n[1],
            build: n[2],
            arch,
            server,
        }
    }

    #[test]
    fn which_fits_best() {
        use Arch::{Amd64, Arm64, X86};
        let w11 = target("10.0.22631", Amd64, false);
        let w10 = target("10.0.14393", Amd64, false);
        let s25 = target("10.0.26100", Amd64, true);
        let w81 = target("6.3.9600", Amd64, false);
        let w7 = target("6.1.7601", X86, false);
        let arm = target("10.0.22631", Arm64, false);
        let cases: &[(&WindowsTarget, &[&str], Option<&str>)] = &[
            (
                &w11,
                &["NTamd64.10.0", "NTamd64.10.0...16299"],
                Some("NTamd64.10.0...16299"),
            ),
            (
                &w10,
                &["NTamd64.10.0", "NTamd64.10.0...16299"],
                Some("NTamd64.10.0"),
            ),
            (&w10, &["NTamd64.10.0...16299"], None),
            // A decoration with a build includes that build.
            (
                &w10,
                &["NTamd64.10.0", "NTamd64.10.0...14393"],
                Some("NTamd64.10.0...14393"),
            ),
            (&w10, &["NTamd64.10.0...14394"], None),
            (&w10, &["NTamd64.6.3"], Some("NTamd64.6.3")),
            (
                &w81,
                &["NTamd64.6.3", "NTamd64.10.0", "NTamd64.6.1"],
                Some("NTamd64.6.3"),
            ),
            (&w81, &["NTamd64.10.0"], None),
            (
                &w7,
                &["NTx86.6.1", "NTx86", "NTamd64.6.1"],
                Some("NTx86.6.1"),
            ),
            (&w7, &["NTx86.6.2", "NT"], Some("NT")),
            (&w10, &["NT", "NTx86"], None),
            (
                &s25,
                &["NTamd64.6.0", "NTamd64.6.0.1", "NTamd64.6.0.3"],
                Some("NTamd64.6.0.3"),
            ),
            (
                &w11,
                &["NTamd64.6.0", "NTamd64.6.0.1", "NTamd64.6.0.3"],
                Some("NTamd64.6.0.1"),
            ),
            (&w11, &["NTamd64.10.0.1.0x200"], None),
            (
                &arm,
                &["NTamd64.10.0", "NTARM64.10.0...16299"],
                Some("NTARM64.10.0...16299"),
            ),
            (&w11, &["NTamd64.ten"], None),
            (&w11, &["ntAMD64"], Some("ntAMD64")),
        ];
        for (target, given, expected) in cases {
            let best = given
                .iter()
                .filter_map(|d| rank(d, target, Kind::Models).map(|r| (r, *d)))
                .max()
                .map(|(_, d)| d);
            assert_eq!(best, *expected, "{target}: {given:?}");
        }
        assert!(rank("NT", &w11, Kind::Install).is_some());
    }

    /// Each part of a decoration: what it must be, and what it adds to the rank.
    #[test]
    fn a_rank_is_the_version_then_the_product_then_the_architecture() {
        let client = target("6.1.7601", Arch::Amd64, false);
        let server = target("6.1.7601", Arch::Amd64, true);
        for (decoration, kind, on_client, on_server) in [
            ("NT", Kind::Install, Some((0, 0, 0, false, false)), true),
            ("NT", Kind::Models, None, false),
            ("NTamd64", Kind::Models, Some((0, 0, 0, false, true)), true),
            ("NTx86", Kind::Install, None, false),
            (
                " ntAMD64.6.1 ",
                Kind::Models,
                Some((6, 1, 0, false, true)),
                true,
            ),
            (
                "NTamd64.6",
                Kind::Models,
                Some((6, 0, 0, false, true)),
                true,
            ),
            ("NTamd64.6.2", Kind::Models, None, false),
            ("NTamd64.7", Kind::Models, None, false),
            (
                "NTamd64.5.9...9999",
                Kind::Models,
                Some((5, 9, 9999, false, true)),
                true,
            ),
            (
                "NTamd64.6.1...7601",
                Kind::Models,
                Some((6, 1, 7601, false, true)),
                true,
            ),
            ("NTamd64.6.1...7602", Kind::Models, None, false),
            (
                "NTamd64.6.1.0x1",
                Kind::Models,
                Some((6, 1, 0, true, true)),
                false,
            ),
            ("NTamd64.6.1.2", Kind::Models, None, true),
            ("NTamd64.6.1.3", Kind::Models, None, true),
            ("NTamd64.6.1.4", Kind::Models, None, false),
            (
                "NTamd64.6.1..0",
                Kind::Models,
                Some((6, 1, 0, false, true)),
                true,
            ),
            ("NTamd64.6.1..1", Kind::Models, None, false),
            ("NT.6.1", Kind::Install, Some((6, 1, 0, false, false)), true),
            ("amd64", Kind::Models, None, false),
        ] {
            assert_eq!(rank(decoration, &client, kind), on_client, "{decoration}");
            let found = rank(decoration, &server, kind).is_some();
            assert_eq!(found, on_server, "{decoration}");
        }
        let x86 = target("6.1.7601", Arch::X86, false);
        assert!(rank("NT", &x86, Kind::Models).is_some());
    }

    #[test]
    fn a_number_is_decimal_or_hexadecimal_and_may_be_negative() {
        for (text, number) in [
            ("10", Some(10)),
            (" 0x1F ", Some(31)),
            ("0X10", Some(16)),
            ("4294967295", Some(u32::MAX)),
            ("-1", Some(u32::MAX)),
            ("4294967296", None),
            ("-2147483649", None),
            ("0x", None),
            ("1f", None),
            ("", None),
        ] {
            assert_eq!(parse_number(text), number, "{text:?}");
        }
    }
}
