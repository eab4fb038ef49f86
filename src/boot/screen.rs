//! Converts screenshots to PNG. New versions of QEMU provide PNG; older ones provide PPM (binary
//! RGB, `P6`).

use std::io::Write;

use flate2::Compression;
use flate2::Crc;
use flate2::write::ZlibEncoder;

const MAX_SIDE: u32 = 16_384;

/// The picture as PNG; `None` if it is neither PNG nor PPM.
pub fn png(picture: &[u8]) -> Option<Vec<u8>> {
    if picture.starts_with(b"\x89PNG") {
        return Some(picture.to_vec());
    }
    let (width, height, pixels) = ppm(picture)?;
    let row = usize::try_from(width).ok()?.checked_mul(3)?;
    let mut data = ZlibEncoder::new(Vec::new(), Compression::fast());
    for line in pixels.chunks_exact(row) {
        // Each line begins with its filter: none.
        data.write_all(&[0]).ok()?;
        data.write_all(line).ok()?;
    }
    let mut header = Vec::new();
    header.extend(width.to_be_bytes());
    header.extend(height.to_be_bytes());
    // Eight bits each of red, green and blue.
    header.extend([8, 2, 0, 0, 0]);
    let mut png = b"\x89PNG\r\n\x1a\n".to_vec();
    chunk(&mut png, b"IHDR", &header);
    chunk(&mut png, b"IDAT", &data.finish().ok()?);
    chunk(&mut png, b"IEND", b"");
    Some(png)
}

fn chunk(png: &mut Vec<u8>, kind: &[u8; 4], data: &[u8]) {
    let mut sum = Crc::new();
    sum.update(kind);
    sum.update(data);
    png.extend(u32::try_from(data.len()).unwrap_or(0).to_be_bytes());
    png.extend(kind);
    png.extend(data);
    png.extend(sum.sum().to_be_bytes());
}

/// Parses width, height and pixels of `P6 <width> <height> 255`.
fn ppm(bytes: &[u8]) -> Option<(u32, u32, &[u8])> {
    let mut rest = bytes.strip_prefix(b"P6")?;
    let mut numbers = [0u32; 3];
    for number in &mut numbers {
        let start = rest.iter().position(u8::is_ascii_digit)?;
        let digits = &rest[start..];
        let end = digits.iter().position(|b| !b.is_ascii_digit())?;
        *number = std::str::from_utf8(&digits[..end]).ok()?.parse().ok()?;
        rest = &digits[end..];
    }
    let [width, height, depth] = numbers;
    let sides = [width, height];
    if depth != 255 || sides.iter().any(|s| *s == 0 || *s > MAX_SIDE) {
        return None;
    }
    let size = usize::try_from(u64::from(width) * u64::from(height) * 3).ok()?;
    Some((width, height, rest.get(1..)?.get(..size)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn ppm_becomes_png() {
        let pixels: Vec<u8> = (0..24).collect();
        let mut picture = b"P6\n4 2\n255\n".to_vec();
        picture.extend(&pixels);
        let made = png(&picture).unwrap();
        assert!(made.starts_with(b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR\0\0\0\x04\0\0\0\x02\x08\x02"));
        assert!(
            made.ends_with(b"IEND\xae\x42\x60\x82"),
            "the known sum of an empty IEND"
        );
        let at = made.windows(4).position(|w| w == b"IDAT").unwrap();
        let size = u32::from_be_bytes(made[at - 4..at].try_into().unwrap()) as usize;
        let mut lines = Vec::new();
        flate2::read::ZlibDecoder::new(&made[at + 4..at + 4 + size])
            .read_to_end(&mut lines)
            .unwrap();
        assert_eq!(lines, [&[0], &pixels[..12], &[0], &pixels[12..]].concat());
        assert_eq!(png(&made).unwrap(), made);
        for bad in [
            &b"P6\n4 2\n255\n123"[..],
            b"P6\n99999 2\n255\n",
            b"P6",
            b"P6 4 2 65535 ",
            b"P5\n1 1\n255\n1",
            b"",
        ] {
            assert_eq!(png(bad), None, "{bad:?}");
        }
    }
}
