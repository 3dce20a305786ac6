//! A small writer of line charts. The same input gives the same bytes.

use std::fmt::Write;

/// Size of the picture in pixels, and its margins: left, top, right, bottom.
const SIZE: (f64, f64) = (760.0, 440.0);
const MARGIN: (f64, f64, f64, f64) = (68.0, 58.0, 190.0, 56.0);
/// Colours that stay apart for most kinds of colour blindness (M. Okabe and K. Ito 2008), dark enough on white.
const COLOURS: [&str; 6] = ["#0072B2", "#D55E00", "#009E73", "#AA4499", "#8A6D00", "#444444"];

/// An axis.
#[derive(Clone, Debug)]
pub struct Axis {
    /// What it shows, with the unit.
    pub title: String,
    /// Ends.
    pub range: (f64, f64),
    /// Where a line and a label stand.
    pub ticks: Vec<f64>,
    /// Whether equal distances are equal ratios.
    pub logarithmic: bool,
}

impl Axis {
    fn place(&self, value: f64, from: f64, to: f64) -> f64 {
        let scale = |value: f64| if self.logarithmic { value.log10() } else { value };
        let (low, high) = (scale(self.range.0), scale(self.range.1));
        let value = value.clamp(self.range.0, self.range.1);
        from + (scale(value) - low) / (high - low) * (to - from)
    }
}

/// A line with its label.
#[derive(Clone, Debug)]
pub struct Series {
    /// Stands at its right end.
    pub label: String,
    /// Points in order.
    pub points: Vec<(f64, f64)>,
    /// Drawn with gaps: something to compare with.
    pub dashed: bool,
}

/// A chart.
#[derive(Clone, Debug)]
pub struct Chart {
    /// What it says.
    pub title: String,
    /// Under which conditions.
    pub subtitle: String,
    /// Horizontal.
    pub x: Axis,
    /// Vertical.
    pub y: Axis,
    /// Lines.
    pub series: Vec<Series>,
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

/// A number as a label: thousands apart, no needless digits.
pub fn label(value: f64) -> String {
    if value >= 1000.0 {
        let thousands = (value / 1000.0).floor();
        return format!("{thousands},{:03.0}", value - thousands * 1000.0);
    }
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

impl Chart {
    /// The picture.
    pub fn svg(&self) -> String {
        let (width, height) = SIZE;
        let (left, top, right, bottom) = (MARGIN.0, MARGIN.1, width - MARGIN.2, height - MARGIN.3);
        let mut out = String::new();
        let mut line = |text: std::fmt::Arguments<'_>| {
            // Writing to a String does not fail.
            let _ = out.write_fmt(text);
            out.push('\n');
        };
        line(format_args!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" \
             font-size=\"12\" role=\"img\" aria-label=\"{}\">",
            escaped(&self.title).replace('"', "&quot;")
        ));
        line(format_args!(
            "<rect width=\"{width}\" height=\"{height}\" fill=\"#ffffff\"/>"
        ));
        line(format_args!(
            "<text x=\"{left}\" y=\"22\" font-size=\"15\" font-weight=\"bold\" fill=\"#222222\">{}</text>",
            escaped(&self.title)
        ));
        line(format_args!(
            "<text x=\"{left}\" y=\"41\" fill=\"#555555\">{}</text>",
            escaped(&self.subtitle)
        ));
        for tick in &self.x.ticks {
            let x = self.x.place(*tick, left, right);
            line(format_args!(
                "<line x1=\"{x:.1}\" y1=\"{top}\" x2=\"{x:.1}\" y2=\"{bottom}\" stroke=\"#eeeeee\"/>\
                 <text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#444444\">{}</text>",
                bottom + 18.0,
                label(*tick)
            ));
        }
        for tick in &self.y.ticks {
            let y = self.y.place(*tick, bottom, top);
            line(format_args!(
                "<line x1=\"{left}\" y1=\"{y:.1}\" x2=\"{right}\" y2=\"{y:.1}\" stroke=\"#e4e4e4\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"#444444\">{}</text>",
                left - 8.0,
                y + 4.0,
                label(*tick)
            ));
        }
        line(format_args!(
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#222222\">{}</text>",
            f64::midpoint(left, right),
            height - 14.0,
            escaped(&self.x.title)
        ));
        let middle = f64::midpoint(top, bottom);
        line(format_args!(
            "<text x=\"18\" y=\"{middle:.1}\" text-anchor=\"middle\" fill=\"#222222\" transform=\"rotate(-90 18 {middle:.1})\">{}</text>",
            escaped(&self.y.title)
        ));
        let labels = self.label_places(bottom, top);
        for ((series, colour), label_y) in self.series.iter().zip(COLOURS.iter().cycle()).zip(labels) {
            let points: Vec<String> = series
                .points
                .iter()
                .map(|(x, y)| {
                    format!(
                        "{:.1},{:.1}",
                        self.x.place(*x, left, right),
                        self.y.place(*y, bottom, top)
                    )
                })
                .collect();
            let dash = if series.dashed {
                " stroke-dasharray=\"6 4\""
            } else {
                ""
            };
            line(format_args!(
                "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\" stroke-linejoin=\"round\"{dash}/>",
                points.join(" ")
            ));
            if let Some((x, y)) = series.points.last() {
                let (x, y) = (self.x.place(*x, left, right), self.y.place(*y, bottom, top));
                line(format_args!(
                    "<line x1=\"{x:.1}\" y1=\"{y:.1}\" x2=\"{:.1}\" y2=\"{label_y:.1}\" stroke=\"{colour}\" stroke-opacity=\"0.4\"/>\
                     <text x=\"{:.1}\" y=\"{:.1}\" fill=\"{colour}\">{}</text>",
                    right + 8.0,
                    right + 11.0,
                    label_y + 4.0,
                    escaped(&series.label)
                ));
            }
        }
        line(format_args!("</svg>"));
        out
    }

    /// Heights of the labels, pushed apart so that none covers another.
    fn label_places(&self, bottom: f64, top: f64) -> Vec<f64> {
        const APART: f64 = 17.0;
        let end = |series: &Series| {
            let last = series.points.last().map_or(self.y.range.0, |(_, y)| *y);
            self.y.place(last, bottom, top)
        };
        let mut order: Vec<(usize, f64)> = self.series.iter().map(end).enumerate().collect();
        order.sort_by(|a, b| a.1.total_cmp(&b.1));
        let mut lowest = f64::NEG_INFINITY;
        for (_, y) in &mut order {
            *y = y.max(lowest + APART);
            lowest = *y;
        }
        // Back up, where the last ones were pushed out of the picture.
        let mut highest = bottom + APART;
        for (_, y) in order.iter_mut().rev() {
            *y = y.min(highest - APART);
            highest = *y;
        }
        order.sort_by_key(|(index, _)| *index);
        order.into_iter().map(|(_, y)| y).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chart_is_the_same_each_time_and_its_labels_do_not_cover_each_other() {
        let axis = |logarithmic| Axis {
            title: "x < y".to_owned(),
            range: (1.0, 1000.0),
            ticks: vec![1.0, 10.0, 1000.0],
            logarithmic,
        };
        let series = |label: &str, end: f64| Series {
            label: label.to_owned(),
            points: vec![(1.0, 1.0), (1000.0, end)],
            dashed: false,
        };
        let chart = Chart {
            title: "A & B".to_owned(),
            subtitle: String::new(),
            x: axis(true),
            y: axis(false),
            series: vec![
                series("a", 500.0),
                series("b", 501.0),
                series("c", 1.0),
                series("d", 1.0),
            ],
        };
        let svg = chart.svg();
        assert_eq!(svg, chart.svg());
        assert!(
            svg.contains("A &amp; B") && svg.contains("x &lt; y") && svg.contains("1,000"),
            "{svg}"
        );
        let mut places = chart.label_places(384.0, 58.0);
        places.sort_by(f64::total_cmp);
        assert!(
            places.windows(2).all(|pair| pair[1] - pair[0] >= 16.9),
            "{places:?}"
        );
        assert!(
            places.iter().all(|place| (40.0..=385.0).contains(place)),
            "{places:?}"
        );
    }

    #[test]
    fn labels_have_no_needless_digits() {
        for (value, text) in [
            (0.5, "0.5"),
            (3.0, "3"),
            (1000.0, "1,000"),
            (12_500.0, "12,500"),
            (0.001, "0.001"),
        ] {
            assert_eq!(label(value), text);
        }
    }
}
