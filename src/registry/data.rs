//! Typed data of a registry value: as stored bytes and as `.reg` text.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use super::hive::{REG_BINARY, REG_DWORD, REG_EXPAND_SZ, REG_MULTI_SZ, REG_NONE, REG_SZ, Value};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", content = "data", rename_all = "kebab-case")]
pub enum RegData {
    None(Vec<u8>),
    Sz(String),
    ExpandSz(String),
    Binary(Vec<u8>),
    Dword(u32),
    MultiSz(Vec<String>),
}

impl RegData {
    pub fn to_value(&self) -> Value {
        let (ty, data) = match self {
            RegData::None(data) => (REG_NONE, data.clone()),
            RegData::Sz(text) => (REG_SZ, utf16z(text)),
            RegData::ExpandSz(text) => (REG_EXPAND_SZ, utf16z(text)),
            RegData::Binary(data) => (REG_BINARY, data.clone()),
            RegData::Dword(n) => (REG_DWORD, n.to_le_bytes().to_vec()),
            RegData::MultiSz(items) => {
                let mut data: Vec<u8> = items.iter().flat_map(|s| utf16z(s)).collect();
                data.extend([0, 0]);
                (REG_MULTI_SZ, data)
            }
        };
        Value { ty, data }
    }

    pub(super) fn to_reg(&self) -> String {
        match self {
            RegData::Sz(text) if is_plain(text) => format!("\"{}\"", escape(text)),
            RegData::Dword(n) => format!("dword:{n:08x}"),
            RegData::Binary(data) => format!("hex:{}", hex(data)),
            _ => {
                let value = self.to_value();
                format!("hex({:x}):{}", value.ty, hex(&value.data))
            }
        }
    }
}

fn utf16z(text: &str) -> Vec<u8> {
    text.encode_utf16()
        .chain([0])
        .flat_map(u16::to_le_bytes)
        .collect()
}

fn is_plain(text: &str) -> bool {
    text.bytes().all(|b| (0x20..0x7f).contains(&b))
}

pub(super) fn escape(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"")
}

fn hex(data: &[u8]) -> String {
    let mut text = String::with_capacity(data.len() * 3);
    for (i, byte) in data.iter().enumerate() {
        let _ = write!(text, "{}{byte:02x}", if i == 0 { "" } else { "," });
    }
    text
}
