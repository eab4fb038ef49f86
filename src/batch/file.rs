//! The list of VMs, a YAML file:
//!
//! ```yaml
//! output-dir: converted        # default: the directory of this file
//! defaults:                    # options of `convert` for every VM
//!   virtio-iso: virtio-win.iso
//! machines:
//!   - source: web01.vmdk
//!   - source: db/db01.vmx
//!     memory: 8192             # options of this VM, over the defaults
//!     virtio-iso: ~            # takes a default away
//! ```
//!
//! Keys and values are checked where they stand, so that an error names its line. The caller
//! interprets the options: [`Rules`] lists them.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};

use crate::yaml;

/// Values by name; `None` removes a default.
pub type Settings = BTreeMap<String, Option<Vec<String>>>;

const MAX_FILE: usize = 16 << 20;
const MAX_MACHINES: usize = 2000;
const MAX_VALUES: usize = 1000;

/// The permitted options. Returns whether one may be repeated (`Ok`), or why it is not permitted
/// here.
pub trait Rules {
    fn shape(&self, name: &str, place: Section) -> Result<Kind, String>;
    fn check(&self, name: &str, value: &str) -> Result<(), String>;
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Section {
    Defaults,
    Machine,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Flag,
    One,
    Many,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct List {
    pub output_dir: Option<String>,
    pub defaults: Settings,
    /// Never empty, each with a `source`.
    pub machines: Vec<Settings>,
}

/// Parses a list; an error names line and column.
pub fn parse(text: &str, rules: &dyn Rules) -> Result<List, String> {
    if text.len() > MAX_FILE {
        return Err(format!("more than {MAX_FILE} bytes"));
    }
    yaml::parse_with(text, |yaml| ListSeed(rules).deserialize(yaml)).map_err(|e| e.message)
}

struct ListSeed<'r>(&'r dyn Rules);

impl<'de> DeserializeSeed<'de> for ListSeed<'_> {
    type Value = List;
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<List, D::Error> {
        d.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for ListSeed<'_> {
    type Value = List;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("`machines`, and perhaps `defaults` and `output-dir`")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<List, A::Error> {
        let mut list = List::default();
        let mut seen = Vec::new();
        let known = |name: &str| match name {
            "output-dir" | "defaults" | "machines" => Ok(()),
            _ => Err(format!(
                "unknown key `{name}`: there are `machines`, `defaults` and `output-dir`; options \
                 of `convert` go below `defaults` or a VM"
            )),
        };
        while let Some(name) = map.next_key_seed(NameSeed(&known))? {
            if seen.contains(&name) {
                return Err(A::Error::custom(format!("`{name}` stands here twice")));
            }
            match name.as_str() {
                "output-dir" => list.output_dir = Some(map.next_value()?),
                "defaults" => {
                    list.defaults = map.next_value_seed(SettingsSeed(self.0, Section::Defaults))?;
                }
                _ => list.machines = map.next_value_seed(MachinesSeed(self.0))?,
            }
            seen.push(name);
        }
        if list.machines.is_empty() {
            return Err(A::Error::custom("no machines: `machines` lists them"));
        }
        Ok(list)
    }
}

struct MachinesSeed<'r>(&'r dyn Rules);

impl<'de> DeserializeSeed<'de> for MachinesSeed<'_> {
    type Value = Vec<Settings>;
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<Self::Value, D::Error> {
        d.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for MachinesSeed<'_> {
    type Value = Vec<Settings>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a list of VMs")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut machines = Vec::new();
        while let Some(machine) = seq.next_element_seed(SettingsSeed(self.0, Section::Machine))? {
            if machines.len() == MAX_MACHINES {
                return Err(A::Error::custom(format!("more than {MAX_MACHINES} VMs")));
            }
            machines.push(machine);
        }
        Ok(machines)
    }
}

struct SettingsSeed<'r>(&'r dyn Rules, Section);

impl<'de> DeserializeSeed<'de> for SettingsSeed<'_> {
    type Value = Settings;
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<Settings, D::Error> {
        d.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for SettingsSeed<'_> {
    type Value = Settings;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self.1 {
            Section::Machine => "a machine: `source` and options of `convert`",
            Section::Defaults => "options of `convert`",
        })
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Settings, A::Error> {
        let Self(rules, place) = self;
        let mut settings = Settings::new();
        let known = |name: &str| rules.shape(name, place).map(drop);
        while let Some(name) = map.next_key_seed(NameSeed(&known))? {
            let kind = rules.shape(&name, place).map_err(A::Error::custom)?;
            let value = map.next_value_seed(ValueSeed {
                rules,
                name: &name,
                kind,
            })?;
            if settings.contains_key(&name) {
                return Err(A::Error::custom(format!("`{name}` stands here twice")));
            }
            settings.insert(name, value);
        }
        if place == Section::Machine && !matches!(settings.get("source"), Some(Some(_))) {
            return Err(A::Error::custom("a VM without `source`"));
        }
        Ok(settings)
    }
}

/// A key, checked at its position.
struct NameSeed<'n>(&'n dyn Fn(&str) -> Result<(), String>);

impl<'de> DeserializeSeed<'de> for NameSeed<'_> {
    type Value = String;
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<String, D::Error> {
        d.deserialize_str(self)
    }
}

impl Visitor<'_> for NameSeed<'_> {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("the name of an option")
    }

    fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<String, E> {
        (self.0)(name).map_err(E::custom)?;
        Ok(name.to_string())
    }
}

struct ValueSeed<'v> {
    rules: &'v dyn Rules,
    name: &'v str,
    kind: Kind,
}

impl ValueSeed<'_> {
    fn one<E: serde::de::Error>(&self, value: String) -> Result<Option<Vec<String>>, E> {
        if self.kind == Kind::Flag {
            return Err(E::custom(format!("`{}` is true or false", self.name)));
        }
        self.rules.check(self.name, &value).map_err(E::custom)?;
        Ok(Some(vec![value]))
    }
}

impl<'de> DeserializeSeed<'de> for ValueSeed<'_> {
    type Value = Option<Vec<String>>;
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<Self::Value, D::Error> {
        d.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for ValueSeed<'_> {
    type Value = Option<Vec<String>>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self.kind {
            Kind::Flag => write!(f, "true or false for `{}`", self.name),
            Kind::One => write!(f, "one value for `{}`", self.name),
            Kind::Many => write!(f, "a value or a list of values for `{}`", self.name),
        }
    }

    fn visit_bool<E: serde::de::Error>(self, value: bool) -> Result<Self::Value, E> {
        match self.kind {
            Kind::Flag => Ok(value.then(|| vec!["true".to_string()])),
            _ => self.one(value.to_string()),
        }
    }

    fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<Self::Value, E> {
        self.one(value.to_string())
    }

    fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<Self::Value, E> {
        self.one(value.to_string())
    }

    fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<Self::Value, E> {
        self.one(value.to_string())
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        if self.kind != Kind::Many {
            return Err(A::Error::custom(format!("`{}` takes one value", self.name)));
        }
        let mut values = Vec::new();
        let item = || ValueSeed {
            kind: Kind::One,
            ..self
        };
        while let Some(value) = seq.next_element_seed(item())? {
            if values.len() == MAX_VALUES {
                return Err(A::Error::custom(format!("more than {MAX_VALUES} values")));
            }
            values.extend(value.into_iter().flatten());
        }
        Ok(Some(values))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Some3;

    impl Rules for Some3 {
        fn shape(&self, name: &str, _: Section) -> Result<Kind, String> {
            match name {
                "source" | "memory" => Ok(Kind::One),
                "compress" => Ok(Kind::Flag),
                "mac" => Ok(Kind::Many),
                _ => Err(format!("unknown option `{name}`")),
            }
        }
        fn check(&self, name: &str, value: &str) -> Result<(), String> {
            match (name, value.parse::<u64>()) {
                ("memory", Err(_)) => Err(format!("`{value}` is no number")),
                _ => Ok(()),
            }
        }
    }

    #[test]
    fn a_list() {
        let list = parse(
            "output-dir: out\ndefaults:\n  memory: 4096\n  compress: true\nmachines:\n\
             - source: a.vmdk\n- {source: b.vmx, compress: false, memory: ~, mac: [m1, m2]}\n",
            &Some3,
        )
        .unwrap();
        assert_eq!(list.output_dir.as_deref(), Some("out"));
        assert_eq!(list.defaults["memory"], Some(vec!["4096".into()]));
        assert_eq!(list.defaults["compress"], Some(vec!["true".into()]));
        assert_eq!(list.machines.len(), 2);
        let second = &list.machines[1];
        assert_eq!((&second["compress"], &second["memory"]), (&None, &None));
        assert_eq!(second["mac"], Some(vec!["m1".into(), "m2".into()]));
    }

    #[test]
    fn errors_name_their_line() {
        for (text, says, line) in [
            (
                "machines:\n- source: a\n  colour: red\n",
                "unknown option `colour`",
                3,
            ),
            (
                "machines:\n- source: a\n- source: b\n  memory: lots\n",
                "no number",
                4,
            ),
            (
                "machines:\n- source: a\n  compress: maybe\n",
                "true or false",
                3,
            ),
            ("machines:\n- source: a\n  memory: [1, 2]\n", "one value", 3),
            (
                "defaults:\n  x: 1\nmachines:\n- source: a\n",
                "unknown option `x`",
                2,
            ),
            (
                "machines:\n- source: a\nmemory: 1\n",
                "unknown key `memory`",
                3,
            ),
            ("machines:\n- memory: 1\n", "without `source`", 2),
            ("machines:\n- source: a\n  source: b\n", "twice", 2),
            ("machines: 7\n", "a list of VMs", 1),
            ("machines: [\n", "", 1),
        ] {
            let error = parse(text, &Some3).unwrap_err();
            assert!(error.contains(says), "{text}\n{error}");
            assert!(error.contains(&format!("line {line} ")), "{text}\n{error}");
        }
        for text in ["", "machines: []", "- source: a", "7", "\u{0}"] {
            assert!(parse(text, &Some3).is_err(), "{text}");
        }
        // Aliases that would grow without end.
        let mut bomb = String::from("a: &a [x,x,x,x,x,x,x,x,x]\n");
        for i in 0..9u8 {
            let (this, that) = (char::from(b'b' + i), char::from(b'a' + i));
            bomb.push_str(&format!(
                "{this}: &{this} [{}*{that}]\n",
                format!("*{that},").repeat(8)
            ));
        }
        assert!(parse(&bomb, &Some3).is_err());
    }
}
