//! The figures as a picture: horizontal bars on a logarithmic scale, as SVG.

use super::{
    figures::Place,
    report::{self, Results},
};
use crate::{
    svg::{Anchor, COLOURS, GRID, Svg},
    table::grouped,
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
        colour: COLOURS[0],
    },
    Series {
        name: "Plinth, VT-x (Bochs)",
        colour: COLOURS[2],
    },
    Series {
        name: "KVM, AMD-V (QEMU)",
        colour: COLOURS[3],
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
    let mut svg = Svg::new(
        width,
        height,
        "Instructions of a round trip, as the guest sees it (logarithmic)",
    );
    svg.legend(
        LABEL_WIDTH,
        32.0,
        180.0,
        SERIES.iter().map(|series| (series.colour, series.name)),
    );
    for decade in 0..=DECADES {
        let x = LABEL_WIDTH + BAR_WIDTH * f64::from(decade) / f64::from(DECADES);
        svg.line((x, TOP), (x, bottom), GRID);
        let power = grouped(10_u64.pow(decade));
        svg.text(x, bottom + 16.0, Anchor::Middle, &power);
    }
    for (index, (title, values)) in rows.iter().enumerate() {
        let y = TOP + ROW_HEIGHT * index as f64;
        let middle = y + ROW_HEIGHT / 2.0;
        svg.text(LABEL_WIDTH - 8.0, middle, Anchor::End, title);
        for (number, (series, value)) in SERIES.iter().zip(values).enumerate() {
            let Some(value) = value else { continue };
            let y = y + 4.0 + number as f64 * (BAR_HEIGHT + 1.0);
            let length = length(*value);
            svg.bar(LABEL_WIDTH, y, length, BAR_HEIGHT, series.colour);
            let (x, y) = (LABEL_WIDTH + length + 3.0, y + BAR_HEIGHT - 1.0);
            svg.label(x, y, Anchor::Start, 9, &grouped(*value));
        }
    }
    svg.finish()
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
