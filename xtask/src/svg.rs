//! Drawings as SVG: shapes, text, axes and colours that all plots of xtask share.
//!
//! The text of a drawing depends on its numbers only, so that drawings can be kept under version
//! control: coordinates are rounded to a tenth of a pixel.

use std::fmt::Write;

/// Colours that can be told apart, also by most who see colours differently.
pub const COLOURS: [&str; 12] = [
    "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f",
    "#bcbd22", "#17becf", "#1b2a6b", "#0b5d3b",
];

/// Colour of the lines of a scale.
pub const GRID: &str = "#ccc";

/// Where a text stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Anchor {
    /// It begins there.
    Start,
    /// Its middle is there.
    Middle,
    /// It ends there.
    End,
}

/// A drawing that is being made. Lengths are pixels, from the upper left corner.
#[derive(Debug)]
pub struct Svg {
    text: String,
}

impl Svg {
    /// A white sheet with a title.
    pub fn new(width: f64, height: f64, title: &str) -> Self {
        let mut svg = Svg {
            text: format!(
                "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{}\" height=\"{}\" \
                 font-family=\"sans-serif\" font-size=\"12\">\n\
                 <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
                number(width),
                number(height)
            ),
        };
        svg.label(10.0, 20.0, Anchor::Start, 15, title);
        svg
    }

    /// A text in the usual size.
    pub fn text(&mut self, x: f64, y: f64, anchor: Anchor, text: &str) {
        self.label(x, y, anchor, 12, text);
    }

    /// A text of some size.
    pub fn label(&mut self, x: f64, y: f64, anchor: Anchor, size: u32, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "",
            Anchor::Middle => " text-anchor=\"middle\"",
            Anchor::End => " text-anchor=\"end\"",
        };
        let size = match size {
            12 => String::new(),
            other => format!(" font-size=\"{other}\""),
        };
        self.add(&format!(
            "<text x=\"{}\" y=\"{}\"{anchor}{size}>{}</text>",
            number(x),
            number(y),
            escaped(text)
        ));
    }

    /// A filled rectangle.
    pub fn bar(&mut self, x: f64, y: f64, width: f64, height: f64, colour: &str) {
        self.add(&format!(
            "<rect x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\" fill=\"{colour}\"/>",
            number(x),
            number(y),
            number(width),
            number(height)
        ));
    }

    /// A straight line.
    pub fn line(&mut self, from: (f64, f64), to: (f64, f64), colour: &str) {
        self.add(&format!(
            "<line x1=\"{}\" y1=\"{}\" x2=\"{}\" y2=\"{}\" stroke=\"{colour}\"/>",
            number(from.0),
            number(from.1),
            number(to.0),
            number(to.1)
        ));
    }

    /// A line through points.
    pub fn curve(&mut self, points: &[(f64, f64)], colour: &str) {
        let mut path = String::new();
        for (x, y) in points {
            let separator = if path.is_empty() { "" } else { " " };
            write!(path, "{separator}{},{}", number(*x), number(*y))
                .expect("a String takes any text");
        }
        self.add(&format!(
            "<polyline points=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.6\"/>"
        ));
    }

    /// A row of coloured squares with their meanings, `step` pixels each.
    pub fn legend<'a>(
        &mut self,
        x: f64,
        y: f64,
        step: f64,
        entries: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) {
        for (index, (colour, name)) in entries.into_iter().enumerate() {
            let x = x + step * index as f64;
            self.bar(x, y, 12.0, 12.0, colour);
            self.text(x + 17.0, y + 10.0, Anchor::Start, name);
        }
    }

    /// The drawing as a file.
    pub fn finish(mut self) -> String {
        self.text += "</svg>\n";
        self.text
    }

    fn add(&mut self, line: &str) {
        self.text += line;
        self.text.push('\n');
    }
}

/// A length as it is written: a tenth of a pixel is enough, and no tenth that is none.
fn number(value: f64) -> String {
    let tenths = (value * 10.0).round() as i64;
    let sign = if tenths < 0 { "-" } else { "" };
    match (tenths.abs() / 10, tenths.abs() % 10) {
        (whole, 0) => format!("{sign}{whole}"),
        (whole, tenth) => format!("{sign}{whole}.{tenth}"),
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_rounded() {
        for (value, text) in [
            (1.0, "1"),
            (1.25, "1.3"),
            (-0.04, "0"),
            (-2.55, "-2.6"),
            (1e6, "1000000"),
        ] {
            assert_eq!(number(value), text);
        }
    }

    #[test]
    fn text_is_escaped_and_elements_are_closed() {
        let mut svg = Svg::new(10.0, 10.5, "a < b & c");
        svg.bar(0.0, 1.0, 2.0, 3.0, COLOURS[0]);
        svg.curve(&[(0.0, 1.0), (2.0, 3.5)], GRID);
        svg.legend(1.0, 1.0, 50.0, [(GRID, "x > y")]);
        let text = svg.finish();
        assert!(text.contains("a &lt; b &amp; c") && text.contains("x &gt; y"));
        assert!(text.contains("points=\"0,1 2,3.5\""));
        assert!(text.starts_with("<svg ") && text.ends_with("</svg>\n"));
        assert_eq!(
            text.matches("<text").count(),
            text.matches("</text>").count()
        );
    }
}
