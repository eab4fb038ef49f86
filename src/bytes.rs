//! Numbers in untrusted bytes, which may end before them; and the structures with them.

pub fn le16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

pub fn le32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

pub fn le64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

pub fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    le32(bytes, at).map(u32::swap_bytes)
}

pub fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    le64(bytes, at).map(u64::swap_bytes)
}

/// A value at a fixed offset of a structure.
pub trait Field: Sized {
    fn get(bytes: &[u8]) -> Option<Self>;
    fn put(&self, bytes: &mut [u8]) -> Option<()>;
}

macro_rules! number {
    ($($number:ty),*) => {$(
        impl Field for $number {
            fn get(bytes: &[u8]) -> Option<Self> {
                bytes.first_chunk().map(|b| Self::from_le_bytes(*b))
            }

            fn put(&self, bytes: &mut [u8]) -> Option<()> {
                *bytes.first_chunk_mut()? = self.to_le_bytes();
                Some(())
            }
        }
    )*};
}
number!(u8, u16, u32, u64);

/// A number whose first byte is the most significant one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Be<T>(pub T);

macro_rules! big_endian {
    ($($number:ty),*) => {$(
        impl Field for Be<$number> {
            fn get(bytes: &[u8]) -> Option<Self> {
                bytes.first_chunk().map(|b| Self(<$number>::from_be_bytes(*b)))
            }

            fn put(&self, bytes: &mut [u8]) -> Option<()> {
                *bytes.first_chunk_mut()? = self.0.to_be_bytes();
                Some(())
            }
        }
    )*};
}
big_endian!(u16, u32, u64);

impl<const N: usize> Field for [u8; N] {
    fn get(bytes: &[u8]) -> Option<Self> {
        bytes.first_chunk().copied()
    }

    fn put(&self, bytes: &mut [u8]) -> Option<()> {
        *bytes.first_chunk_mut()? = *self;
        Some(())
    }
}

impl Field for [u64; 3] {
    fn get(bytes: &[u8]) -> Option<Self> {
        let at = |i: usize| u64::get(bytes.get(8 * i..)?);
        Some([at(0)?, at(1)?, at(2)?])
    }

    fn put(&self, bytes: &mut [u8]) -> Option<()> {
        let mut pairs = self.iter().enumerate();
        pairs.try_for_each(|(i, number)| number.put(bytes.get_mut(8 * i..)?))
    }
}

impl Field for uuid::Uuid {
    fn get(bytes: &[u8]) -> Option<Self> {
        bytes.first_chunk().map(|b| Self::from_bytes_le(*b))
    }

    fn put(&self, bytes: &mut [u8]) -> Option<()> {
        self.to_bytes_le().put(bytes)
    }
}

/// Declares a structure on a disk: its length, and for each field its offset, name and type. All
/// fields are declared, even if none is read and the structure is never written.
macro_rules! layout {
    ($(#[$doc:meta])* $name:ident [$len:literal] {
        $($(#[$field_doc:meta])* $offset:literal => $field:ident: $kind:ty,)*
    }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq)]
        #[allow(dead_code)]
        pub struct $name {
            $($(#[$field_doc])* pub $field: $kind,)*
        }

        #[allow(dead_code)]
        impl $name {
            pub const LEN: usize = $len;

            /// Parses the structure at the start of `bytes`; `None` if they are too few.
            pub fn read(bytes: &[u8]) -> Option<Self> {
                let bytes = bytes.get(..Self::LEN)?;
                Some(Self { $($field: $crate::bytes::Field::get(bytes.get($offset..)?)?,)* })
            }

            /// Parses a structure whose end may be missing; its missing bytes count as 0.
            pub fn padded(bytes: &[u8]) -> Option<Self> {
                let mut whole = [0; Self::LEN];
                let there = bytes.len().min(Self::LEN);
                whole[..there].copy_from_slice(&bytes[..there]);
                Self::read(&whole)
            }

            /// Writes the fields at their offsets; bytes between them stay.
            pub fn write(&self, bytes: &mut [u8]) -> Option<()> {
                let bytes = bytes.get_mut(..Self::LEN)?;
                $($crate::bytes::Field::put(&self.$field, bytes.get_mut($offset..)?)?;)*
                Some(())
            }
        }
    };
}
pub(crate) use layout;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_that_is_cut_off_is_none() {
        let bytes = [1, 2, 3, 4, 5, 6, 7, 8, 9];
        assert_eq!(le16(&bytes, 0), Some(0x0201));
        assert_eq!(le32(&bytes, 5), Some(0x0908_0706));
        assert_eq!(le64(&bytes, 1), Some(0x0908_0706_0504_0302));
        assert_eq!(be32(&bytes, 5), Some(0x0607_0809));
        assert_eq!(be64(&bytes, 1), Some(0x0203_0405_0607_0809));
        assert_eq!(le16(&bytes, 8), None);
        assert_eq!(le32(&bytes, 6), None);
        assert_eq!(le64(&bytes, 2), None);
        assert_eq!(le16(&bytes, usize::MAX), None);
    }
}
