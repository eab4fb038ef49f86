//! A user's changes to the domain XML (`--xml-patch`), for settings without an option.
//!
//! A patch is a `<domain>` with only the changes in it. Its elements are merged into those of the
//! same name: attributes and text are set, children merged recursively, and missing elements added.
//! Below `<devices>` an element is always added, because there are many of a kind. Attributes in
//! the namespace [`PATCH_NS`] change that: `op` is `merge`, `add`, `replace` or `remove`. `where`
//! (`path/@attribute=value` or `path=text`) selects among elements of that name; without it, all
//! are meant. `stage` limits the change to `bootstrap` or `final`.
//!
//! Name, UUID and the mark of hyper2kvm cannot be changed: both boots are of one VM, and `boot`
//! finds it by them.

use super::element::Element;
use super::model::Stage;

pub const PATCH_NS: &str = "urn:hyper2kvm:patch:1";

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Patch {
    root: Element,
    /// The prefix of [`PATCH_NS`], with its colon.
    prefix: Option<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum PatchError {
    #[error("the patch is not understood")]
    Xml(#[from] super::element::XmlError),
    #[error("the patch begins with <{0}>, and should with <domain>")]
    Root(String),
    #[error("<{element}>: {attribute}={value:?} is not understood")]
    Attribute {
        element: String,
        attribute: &'static str,
        value: String,
    },
    #[error("<{element}>: no such element in the {stage} domain{condition}")]
    NoMatch {
        element: String,
        stage: &'static str,
        condition: String,
    },
    #[error("the patch changes <{0}>, which must be the same in both boots")]
    Identity(&'static str),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Op {
    Merge,
    Add,
    Replace,
    Remove,
}

impl Patch {
    pub fn parse(bytes: &[u8]) -> Result<Self, PatchError> {
        let root = Element::parse(bytes)?;
        if !root.is("domain") {
            return Err(PatchError::Root(root.name));
        }
        let prefix = root.attrs.iter().find_map(|(key, value)| {
            let prefix = key.strip_prefix("xmlns:")?;
            (value == PATCH_NS).then(|| format!("{prefix}:"))
        });
        Ok(Self { root, prefix })
    }

    /// Returns the domain with the changes.
    pub fn apply(&self, domain: &Element, stage: Stage) -> Result<Element, PatchError> {
        let mut patched = domain.clone();
        for (key, value) in &self.root.attrs {
            // Namespaces of added elements, such as QEMU's own options.
            if value != PATCH_NS {
                set(&mut patched, key, value);
            }
        }
        for change in &self.root.children {
            self.change(&mut patched, change, stage, Op::Merge)?;
        }
        for name in ["name", "uuid", "metadata"] {
            let kept = match (domain.first(name), patched.first(name)) {
                (Some(old), Some(new)) if name == "metadata" => {
                    old.children.iter().all(|mark| new.children.contains(mark))
                }
                (old, new) => old == new,
            };
            if !kept || patched.all(name).count() != 1 {
                return Err(PatchError::Identity(name));
            }
        }
        Ok(patched)
    }

    fn control<'a>(&self, element: &'a Element, name: &str) -> Option<&'a str> {
        let key = format!("{}{name}", self.prefix.as_ref()?);
        let found = element.attrs.iter().find(|(k, _)| *k == key);
        found.map(|(_, value)| value.as_str())
    }

    fn change(
        &self,
        parent: &mut Element,
        change: &Element,
        stage: Stage,
        usual: Op,
    ) -> Result<(), PatchError> {
        let wrong = |attribute, value: &str| PatchError::Attribute {
            element: change.name.clone(),
            attribute,
            value: value.to_owned(),
        };
        match self.control(change, "stage") {
            Some("bootstrap") if stage != Stage::Bootstrap => return Ok(()),
            Some("final") if stage != Stage::Final => return Ok(()),
            Some("bootstrap" | "final") | None => {}
            Some(other) => return Err(wrong("stage", other)),
        }
        let condition = match self.control(change, "where") {
            Some(text) => Some(Condition::parse(text).ok_or_else(|| wrong("where", text))?),
            None => None,
        };
        let op = match self.control(change, "op") {
            Some("merge") => Op::Merge,
            Some("add") => Op::Add,
            Some("replace") => Op::Replace,
            Some("remove") => Op::Remove,
            Some(other) => return Err(wrong("op", other)),
            // A selection must match at least one element.
            None if condition.is_some() => Op::Merge,
            None => usual,
        };
        let found: Vec<usize> = (0..parent.children.len())
            .filter(|i| {
                let child = &parent.children[*i];
                child.name == change.name && condition.as_ref().is_none_or(|c| c.holds(child))
            })
            .collect();
        if found.is_empty() && (condition.is_some() || op == Op::Remove) {
            return Err(PatchError::NoMatch {
                element: change.name.clone(),
                stage: stage.as_str(),
                condition: condition.map_or_else(String::new, |c| format!(" with {}", c.text)),
            });
        }
        match op {
            Op::Add => parent.push(self.plain(change, stage)),
            Op::Merge | Op::Replace if found.is_empty() => parent.push(self.plain(change, stage)),
            Op::Merge => {
                for i in found {
                    self.merge(&mut parent.children[i], change, stage)?;
                }
            }
            Op::Replace => {
                for i in found {
                    parent.children[i] = self.plain(change, stage);
                }
            }
            Op::Remove => {
                for i in found.into_iter().rev() {
                    parent.children.remove(i);
                }
            }
        }
        Ok(())
    }

    fn merge(
        &self,
        target: &mut Element,
        change: &Element,
        stage: Stage,
    ) -> Result<(), PatchError> {
        for (key, value) in &change.attrs {
            if !self.is_control(key) {
                set(target, key, value);
            }
        }
        if !change.text.is_empty() {
            target.text.clone_from(&change.text);
        }
        let usual = if target.is("devices") {
            Op::Add
        } else {
            Op::Merge
        };
        for child in &change.children {
            self.change(target, child, stage, usual)?;
        }
        Ok(())
    }

    fn is_control(&self, key: &str) -> bool {
        self.prefix.as_ref().is_some_and(|p| key.starts_with(p))
    }

    /// The element without attributes of the patch namespace, and without children of the other
    /// stage.
    fn plain(&self, element: &Element, stage: Stage) -> Element {
        let other = match stage {
            Stage::Bootstrap => "final",
            Stage::Final => "bootstrap",
        };
        let mut plain = element.clone();
        plain.attrs.retain(|(key, _)| !self.is_control(key));
        plain.children = element
            .children
            .iter()
            .filter(|child| self.control(child, "stage") != Some(other))
            .map(|child| self.plain(child, stage))
            .collect();
        plain
    }
}

fn set(element: &mut Element, key: &str, value: &str) {
    match element.attrs.iter_mut().find(|(k, _)| k == key) {
        Some(attr) => value.clone_into(&mut attr.1),
        None => element.attrs.push((key.to_owned(), value.to_owned())),
    }
}

/// `path/@attribute=value`, `@attribute=value` or `path=text`.
struct Condition<'a> {
    text: &'a str,
    path: &'a str,
    attribute: Option<&'a str>,
    value: &'a str,
}

impl<'a> Condition<'a> {
    fn parse(text: &'a str) -> Option<Self> {
        let (left, value) = text.split_once('=')?;
        let (path, attribute) = match left.rsplit_once('@') {
            Some((path, name)) => (path.trim_end_matches('/'), Some(name)),
            None => (left, None),
        };
        let empty = path.is_empty() && attribute.is_none() || attribute == Some("");
        (!empty).then_some(Self {
            text,
            path,
            attribute,
            value: value.trim_matches(['\'', '"']),
        })
    }

    fn holds(&self, element: &Element) -> bool {
        let found = match self.path {
            "" => Some(element),
            path => element.path(path),
        };
        found.is_some_and(|e| match self.attribute {
            Some(name) => e.attr(name) == Some(self.value),
            None => e.text == self.value,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{FirmwareChoice, xml::to_element};

    fn domain(stage: Stage) -> Element {
        let machine = crate::domain::tests::machine();
        let portable = FirmwareChoice::Portable { secure_boot: false };
        to_element(&machine, stage, &portable).unwrap()
    }

    fn patch(text: &str) -> Result<Patch, PatchError> {
        let root = format!("<domain xmlns:p='{PATCH_NS}'>{text}</domain>");
        Patch::parse(root.as_bytes())
    }

    #[test]
    fn merges_adds_replaces_and_removes() {
        // The patch, text that the final domain then has, text that it no longer has.
        let cases = [
            (
                "<memory>8388608</memory>",
                "<memory unit=\"KiB\">8388608<",
                ">4194304</memory",
            ),
            (
                "<cpu mode='host-model'/>",
                "mode=\"host-model\" check=\"none\"",
                "host-passthrough",
            ),
            (
                "<iothreads>2</iothreads>",
                "<iothreads>2</iothreads>",
                "nothing",
            ),
            (
                "<devices><watchdog model='itco' action='reset'/></devices>",
                "<watchdog model=\"itco\" action=\"reset\"/>",
                "hyper2kvm:patch",
            ),
            (
                "<devices><disk p:where='target/@dev=vda'><driver queues='4'/></disk></devices>",
                "discard=\"unmap\" queues=\"4\"",
                "p:where",
            ),
            (
                "<devices><graphics p:op='remove'/></devices>",
                "<video>",
                "<graphics",
            ),
            (
                "<devices><video p:op='replace'><model type='none'/></video></devices>",
                "<model type=\"none\"/>",
                "16384",
            ),
            (
                "<clock><timer p:where='@name=hpet' present='yes'/></clock>",
                "<timer name=\"hpet\" present=\"yes\"/>",
                "present=\"no\"",
            ),
            (
                "<os p:stage='bootstrap'><bios useserial='yes'/></os>",
                "<os ",
                "useserial",
            ),
            (
                "<q:commandline xmlns:q='http://libvirt.org/schemas/domain/qemu/1.0'><q:arg value='-x'/></q:commandline>",
                "<q:arg value=\"-x\"/>",
                "hyper2kvm:patch",
            ),
        ];
        for (text, there, gone) in cases {
            let patched = patch(text)
                .unwrap()
                .apply(&domain(Stage::Final), Stage::Final);
            let xml = patched.unwrap().to_document();
            assert!(xml.contains(there), "{text}: {xml}");
            assert!(!xml.contains(gone), "{text}: {xml}");
        }
        let nothing = patch("")
            .unwrap()
            .apply(&domain(Stage::Final), Stage::Final)
            .unwrap();
        assert_eq!(nothing, domain(Stage::Final));
    }

    #[test]
    fn a_patch_for_one_stage_leaves_the_other_as_it_is() {
        for (attribute, first, last) in [
            ("", true, true),
            ("p:stage='bootstrap'", true, false),
            ("p:stage='final'", false, true),
        ] {
            for text in [
                // A change of an element, one inside it, and one inside an element that is added.
                format!("<os {attribute}><bios useserial='yes'/></os>"),
                format!("<os><bios {attribute} useserial='yes'/></os>"),
                format!("<devices><x><bios {attribute} useserial='yes'/></x></devices>"),
            ] {
                let patch = patch(&text).unwrap();
                for (stage, changed) in [(Stage::Bootstrap, first), (Stage::Final, last)] {
                    let xml = patch.apply(&domain(stage), stage).unwrap().to_document();
                    assert_eq!(xml.contains("useserial"), changed, "{text} {stage:?}");
                    assert!(!xml.contains("p:stage"), "{text}");
                }
            }
        }
    }

    #[test]
    fn refusals() {
        for (text, want) in [
            ("<uuid>1</uuid>", "changes <uuid>"),
            ("<name>x</name>", "changes <name>"),
            ("<metadata p:op='remove'/>", "changes <metadata>"),
            (
                "<metadata><hyper2kvm:conversion p:op='remove'/></metadata>",
                "changes <metadata>",
            ),
            ("<cpu p:op='eat'/>", "op=\"eat\""),
            ("<cpu p:stage='third'/>", "stage=\"third\""),
            ("<cpu p:where='mode'/>", "where=\"mode\""),
            ("<cpu p:where='@=x'/>", "where=\"@=x\""),
            (
                "<devices><disk p:where='target/@dev=vdz' p:op='remove'/></devices>",
                "no such element in the final domain with target/@dev=vdz",
            ),
            ("<vsock p:op='remove'/>", "no such element"),
        ] {
            let patch = patch(text).unwrap();
            let error = patch
                .apply(&domain(Stage::Final), Stage::Final)
                .unwrap_err();
            assert!(error.to_string().contains(want), "{text}: {error}");
        }
        assert!(
            Patch::parse(b"<devices/>")
                .unwrap_err()
                .to_string()
                .contains("<domain>")
        );
        assert!(Patch::parse(b"<domain>").is_err());
        // Other metadata may exist beside that of hyper2kvm.
        let more = patch("<metadata><x:y xmlns:x='urn:x'/></metadata>").unwrap();
        let xml = more
            .apply(&domain(Stage::Final), Stage::Final)
            .unwrap()
            .to_document();
        assert!(xml.contains("<x:y") && xml.contains("hyper2kvm:conversion"));
    }

    /// A small domain, and what each operation makes of it.
    #[test]
    fn every_operation_on_every_selection() {
        let small = Element::parse(
            b"<domain type='kvm'><name>n</name><uuid>u</uuid><metadata><m/></metadata>\
              <a k='1'>one</a><a k='2' l='x'>two<b>deep</b></a>\
              <devices><d k='1'/><d k='2'><e v='7'/></d></devices></domain>",
        )
        .unwrap();
        let mut text = String::new();
        for change in [
            "<a p:op='merge' k='9'/>",
            "<a l='y'>new</a>",
            "<a p:where='@k=2'><b>other</b><c/></a>",
            "<a p:where=\"b='deep'\" p:op='remove'/>",
            "<a p:where='b=' p:op='remove'/>",
            "<a p:op='remove'/>",
            "<a p:op='add' k='3'/>",
            "<a p:op='replace'>r</a>",
            "<new p:op='replace'>r</new>",
            "<new p:op='merge'><p:x p:stage='final'/><y p:stage='bootstrap'/></new>",
            "<devices><d k='3'/></devices>",
            "<devices><d p:op='merge' k='3'/></devices>",
            "<devices><d p:where='e/@v=7' k='3'/></devices>",
            "<devices><d p:where='e/@v=8' k='3'/></devices>",
            "<devices><d p:where='@k=1' p:op='replace'><f p:op='x'/></d></devices>",
            "<devices><d p:where='@k=3' p:op='add'/></devices>",
            "<devices><d p:where='@k=1' p:op='add'><g/></d></devices>",
            "<devices p:op='remove'/>",
            "<a p:where='=x'/>",
            "<a p:where='x/@=x'/>",
            "<a p:where='x'/>",
            "<a p:stage='bootstrap' p:op='remove'/>",
            "<name>n</name>",
            "<name p:op='add'>n</name>",
            "<uuid p:op='remove'/>",
            "<metadata><m p:op='remove'/></metadata>",
            "<metadata p:op='replace'><m/><n/></metadata>",
        ] {
            let patched = patch(change).unwrap().apply(&small, Stage::Final);
            let shown = match patched {
                Ok(patched) => {
                    let shown = patched.to_document().replace('\n', "");
                    let shown: Vec<&str> = shown.split_whitespace().collect();
                    shown.join(" ").replace("> <", "><")
                }
                Err(error) => format!("error: {error}"),
            };
            text.push_str(&format!("{change}\n  {shown}\n"));
        }
        insta::assert_snapshot!("patches", text);
        // A value may be in quotes of both kinds, and have a `=` of its own.
        let equals =
            Element::parse(b"<domain><name/><uuid/><metadata/><a k='v=w'>x=y</a><a>z</a></domain>")
                .unwrap();
        for (change, left) in [
            ("<a p:where='@k=v=w' p:op='remove'/>", "z"),
            ("<a p:where='@k=\"v=w\"' p:op='remove'/>", "z"),
            ("<a p:where=\"@k='v=w'\" p:op='remove'/>", "z"),
        ] {
            let patched = patch(change).unwrap().apply(&equals, Stage::Final).unwrap();
            let texts: Vec<_> = patched.all("a").map(|a| a.text.as_str()).collect();
            assert_eq!(texts, [left], "{change}");
        }
        // Attributes of the root are set too; without the namespace nothing is a control.
        let root = Patch::parse(b"<domain type='qemu' xmlns:q='urn:q'/>").unwrap();
        let patched = root.apply(&small, Stage::Final).unwrap();
        assert_eq!(patched.attr("type"), Some("qemu"));
        assert!(patched.attrs.contains(&("xmlns:q".into(), "urn:q".into())));
        let plain = Patch::parse(b"<domain><a p:op='remove' k='5'/></domain>").unwrap();
        let patched = plain.apply(&small, Stage::Final).unwrap();
        let values: Vec<_> = patched.all("a").map(|a| a.attr("k")).collect();
        assert_eq!(values, [Some("5"), Some("5")]);
    }
}
