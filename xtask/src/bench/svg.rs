//! The figures as a picture: horizontal bars on a logarithmic scale, as SVG.

use std::fmt::Write;

use super::{
    figures::Place,
    report::{self, Results, grouped},
};

/// Pixels.
const LABEL_WIDTH: f64 = 330.0;
const BAR_WIDTH: f64 = 520.0;
const BAR_HEIGHT: f64 = 9.0;
const ROW_HEIGHT: f64 = 38.0;
const TOP: f64 = 56.0;

/// Decades shown: 1 to 10,000 instructions.
const DECADES: u32 = 4;

/// One kind of bars.
struct Series {
    name: &'static str,
    colour: &'static str,
}

const SERIES: [Series; 3] = [
    Series {
        name: "Plinth, AMD-V (QEMU)",
        colour: "#1f77b4",
    },
    Series {
        name: "Plinth, VT-x (Bochs)",
        colour: "#2ca02c",
    },
    Series {
        name: "KVM, AMD-V (QEMU)",
        colour: "#d62728",
    },
];

/// Length of a bar.
fn length(value: u64) -> f64 {
    let decades = (value.max(1) as f64).log10();
    (decades / f64::from(DECADES) * BAR_WIDTH).min(BAR_WIDTH)
}

/// A picture of the operations that KVM was measured for, too.
pub fn draw(results: &Results) -> String {
    let rows: Vec<_> = report::OPERATIONS
        .iter()
        .filter(|operation| operation.kvm.is_some())
        .map(|operation| {
            let ours = |place| results.median(place, operation.key);
            let values = [ours(Place::QemuAmdv), ours(Place::BochsVtx), operation.kvm];
            (operation.title, values)
        })
        .filter(|(_, values)| values[0].is_some() || values[1].is_some())
        .collect();
    let width = LABEL_WIDTH + BAR_WIDTH + 80.0;
    let bottom = TOP + ROW_HEIGHT * rows.len() as f64;
    let height = bottom + 30.0;
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"10\" y=\"20\" font-size=\"15\">Instructions of a round trip, as the guest sees it \
         (logarithmic)</text>\n"
    );
    let mut add = |line: String| writeln!(text, "{line}").expect("a String takes any text");
    for (index, series) in SERIES.iter().enumerate() {
        let x = LABEL_WIDTH + 180.0 * index as f64;
        add(format!(
            "<rect x=\"{x}\" y=\"32\" width=\"12\" height=\"12\" fill=\"{}\"/>\
             <text x=\"{}\" y=\"42\">{}</text>",
            series.colour,
            x + 17.0,
            series.name
        ));
    }
    for decade in 0..=DECADES {
        let x = LABEL_WIDTH + BAR_WIDTH * f64::from(decade) / f64::from(DECADES);
        add(format!(
            "<line x1=\"{x}\" y1=\"{TOP}\" x2=\"{x}\" y2=\"{bottom}\" stroke=\"#ccc\"/>\
             <text x=\"{x}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            bottom + 16.0,
            grouped(10_u64.pow(decade))
        ));
    }
    for (index, (title, values)) in rows.iter().enumerate() {
        let y = TOP + ROW_HEIGHT * index as f64;
        add(format!(
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>",
            LABEL_WIDTH - 8.0,
            y + ROW_HEIGHT / 2.0,
            escaped(title)
        ));
        for (number, (series, value)) in SERIES.iter().zip(values).enumerate() {
            let Some(value) = value else { continue };
            let y = y + 4.0 + number as f64 * (BAR_HEIGHT + 1.0);
            let length = length(*value);
            add(format!(
                "<rect x=\"{LABEL_WIDTH}\" y=\"{y}\" width=\"{length:.1}\" height=\"{BAR_HEIGHT}\" \
                 fill=\"{}\"/><text x=\"{:.1}\" y=\"{}\" font-size=\"9\">{}</text>",
                series.colour,
                LABEL_WIDTH + length + 3.0,
                y + BAR_HEIGHT - 1.0,
                grouped(*value)
            ));
        }
    }
    text += "</svg>\n";
    text
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::figures::{Figure, Figures, Unit};

    #[test]
    fn each_decade_is_as_long_as_the_next() {
        assert!((length(1)).abs() < 0.01);
        assert!((length(100) - BAR_WIDTH / 2.0).abs() < 0.01);
        assert!((length(u64::MAX) - BAR_WIDTH).abs() < 0.01);
        assert!((length(0)).abs() < 0.01);
    }

    #[test]
    fn what_was_measured_is_drawn() {
        let mut results = Results::default();
        let mut figures = Figures::new();
        figures.insert("cpuid".into(), Figure::once(247, Unit::Instructions));
        figures.insert("uart-in".into(), Figure::once(300, Unit::Instructions));
        results.places.insert(Place::QemuAmdv, figures);
        let text = draw(&results);
        assert!(text.contains(">CPUID<") && text.contains(">247<") && text.contains(">2,835<"));
        assert!(!text.contains("UART"));
        assert_eq!(text.matches("<svg").count(), text.matches("</svg>").count());
    }
}
