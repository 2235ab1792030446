//! A picture of an emulated machine's screen.

/// Rows of pixels: red, green, blue.
pub struct Picture {
    /// Pixels in a row.
    width: usize,
    pixels: Vec<u8>,
}

impl Picture {
    /// Reads a binary PPM (Netpbm, ppm(5)) of 8 bits without comments. `None`: it is none, or not whole yet.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let mut parts = bytes.splitn(4, |byte| byte.is_ascii_whitespace());
        let mut text = || std::str::from_utf8(parts.next()?).ok();
        if text()? != "P6" {
            return None;
        }
        let width: usize = text()?.parse().ok()?;
        let height: usize = text()?.parse().ok()?;
        let pixels = parts.next()?.strip_prefix(b"255\n")?;
        let whole = width.checked_mul(height)?.checked_mul(3)? == pixels.len();
        whole.then(|| Picture {
            width,
            pixels: pixels.to_vec(),
        })
    }

    /// How many pixels are not black in these columns.
    pub fn lit(&self, columns: std::ops::Range<usize>) -> usize {
        let rows = self.pixels.chunks_exact(self.width.max(1) * 3);
        let lit = |row: &[u8]| {
            let pixels = row.chunks_exact(3).skip(columns.start).take(columns.len());
            pixels
                .filter(|pixel| pixel.iter().any(|&part| part > 0))
                .count()
        };
        rows.map(lit).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lit_pixels_are_counted_by_columns() {
        let mut file = b"P6\n3 2\n255\n".to_vec();
        file.extend([0, 0, 0, 1, 0, 0, 9, 9, 9]);
        file.extend([0, 0, 0, 0, 0, 0, 0, 0, 7]);
        let picture = Picture::parse(&file).unwrap();
        assert_eq!(picture.width, 3);
        assert_eq!(
            [0..1, 1..2, 2..3, 0..3].map(|c| picture.lit(c)),
            [0, 1, 2, 3]
        );
    }

    #[test]
    fn a_file_that_is_not_whole_is_no_picture() {
        let mut file = b"P6\n1 1\n255\n".to_vec();
        file.extend([1, 2, 3]);
        assert!(Picture::parse(&file).is_some());
        for length in 0..file.len() {
            assert!(Picture::parse(&file[..length]).is_none(), "{length}");
        }
        assert!(Picture::parse(b"P6\n1 1\n65535\n\0\x01\0\x02\0\x03").is_none());
    }
}
