//! Lines over time as a plain SVG, readable on white and on black.
//!
//! A page of code instead of a drawing crate: none of those looked at leaves colours to the reader's scheme
//! (`prefers-color-scheme`), and three panels of polylines need nothing else of them. Colours are of Okabe and Ito's
//! set, told apart by colour-blind readers too; lines differ in their dashes as well.

use std::fmt::Write;

/// Panels above each other with one x axis.
#[derive(Clone, Debug)]
pub struct Picture {
    /// Above all.
    pub title: String,
    /// Under all.
    pub x_name: String,
    /// From top to bottom.
    pub panels: Vec<Panel>,
}

/// One y axis.
#[derive(Clone, Debug)]
pub struct Panel {
    /// Above it.
    pub title: String,
    /// Of y.
    pub scale: Scale,
    /// At most six look different.
    pub lines: Vec<Line>,
}

/// How y is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// From 0.
    Linear,
    /// By powers of ten; what is not above 0 is left out.
    Logarithmic,
}

/// A name for the legend and points by ascending x.
#[derive(Clone, Debug)]
pub struct Line {
    /// The same in all panels.
    pub name: String,
    /// (x, y).
    pub points: Vec<(f64, f64)>,
}

const WIDTH: f64 = 900.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 76.0;
const PANEL: f64 = 180.0;
const BETWEEN: f64 = 44.0;
const BOTTOM: f64 = 46.0;
const LOOKS: usize = 6;

const STYLE: &str = "\
svg{font:13px system-ui,sans-serif}text{fill:#24292f}.title{font-size:15px;font-weight:600}
.grid{stroke:#d0d7de;stroke-width:1}.line{fill:none;stroke-width:1.8;stroke-linejoin:round}
.l0{stroke:#0072b2}.l1{stroke:#0072b2;stroke-dasharray:6 3}.l2{stroke:#d55e00}
.l3{stroke:#d55e00;stroke-dasharray:6 3}.l4{stroke:#007a5a}.l5{stroke:#007a5a;stroke-dasharray:6 3}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.grid{stroke:#3d444d}
.l0,.l1{stroke:#56b4e9}.l2,.l3{stroke:#e69f00}.l4,.l5{stroke:#2fc79a}}";

impl Picture {
    /// The file's content. The background is the page's.
    #[must_use]
    pub fn svg(&self) -> String {
        let panels = self.panels.len() as f64;
        let height = TOP + panels * (PANEL + BETWEEN) - BETWEEN + BOTTOM;
        let mut svg = String::new();
        let _ = writeln!(
            svg,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{0}\">\n\
             <style>{STYLE}</style>\n<text class=\"title\" x=\"{LEFT}\" y=\"20\">{0}</text>",
            escaped(&self.title)
        );
        self.legend(&mut svg);
        let x_axis = Axis::linear(self.last_x()).cut();
        for (number, panel) in self.panels.iter().enumerate() {
            let top = TOP + number as f64 * (PANEL + BETWEEN);
            panel.draw(&mut svg, top, &x_axis, number + 1 == self.panels.len());
        }
        let _ = writeln!(
            svg,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>\n</svg>",
            f64::midpoint(LEFT, WIDTH - RIGHT),
            height - 8.0,
            escaped(&self.x_name)
        );
        svg
    }

    fn legend(&self, svg: &mut String) {
        let mut x = LEFT;
        for (look, line) in self
            .panels
            .iter()
            .take(1)
            .flat_map(|panel| &panel.lines)
            .enumerate()
        {
            let _ = writeln!(
                svg,
                "<path class=\"line l{}\" d=\"M{x} 38h28\"/><text x=\"{}\" y=\"42\">{}</text>",
                look % LOOKS,
                x + 34.0,
                escaped(&line.name)
            );
            x += 50.0 + 7.5 * line.name.chars().count() as f64;
        }
    }

    fn last_x(&self) -> f64 {
        let points = self
            .panels
            .iter()
            .flat_map(|panel| &panel.lines)
            .flat_map(|line| &line.points);
        points.map(|point| point.0).fold(0.0, f64::max)
    }
}

impl Panel {
    fn draw(&self, svg: &mut String, top: f64, x_axis: &Axis, is_last: bool) {
        let values = self
            .lines
            .iter()
            .flat_map(|line| &line.points)
            .map(|point| point.1);
        let y_axis = match self.scale {
            Scale::Linear => Axis::linear(values.fold(0.0, f64::max)),
            Scale::Logarithmic => Axis::logarithmic(values),
        };
        let x = |value: f64| LEFT + x_axis.share(value) * (WIDTH - LEFT - RIGHT);
        let y = |value: f64| top + PANEL - y_axis.share(value) * PANEL;
        let _ = writeln!(
            svg,
            "<text x=\"{LEFT}\" y=\"{:.1}\">{}</text>",
            top - 8.0,
            escaped(&self.title)
        );
        for &mark in &y_axis.marks {
            let _ = writeln!(
                svg,
                "<path class=\"grid\" d=\"M{LEFT} {0:.1}H{1}\"/><text x=\"{2}\" y=\"{3:.1}\" text-anchor=\"end\">{4}</text>",
                y(mark),
                WIDTH - RIGHT,
                LEFT - 8.0,
                y(mark) + 4.0,
                label(mark)
            );
        }
        for &mark in x_axis.marks.iter().filter(|_| is_last) {
            let _ = writeln!(
                svg,
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                x(mark),
                top + PANEL + 18.0,
                label(mark)
            );
        }
        for (look, line) in self.lines.iter().enumerate() {
            let mut path = String::new();
            for &(at, value) in line.points.iter().filter(|point| y_axis.has(point.1)) {
                let command = if path.is_empty() { 'M' } else { 'L' };
                let _ = write!(path, "{command}{:.1} {:.1}", x(at), y(value));
            }
            if !path.is_empty() {
                let _ = writeln!(svg, "<path class=\"line l{}\" d=\"{path}\"/>", look % LOOKS);
            }
        }
    }
}

/// From a value to a share of the length, with marks at round numbers.
struct Axis {
    scale: Scale,
    low: f64,
    high: f64,
    greatest: f64,
    marks: Vec<f64>,
}

impl Axis {
    fn linear(greatest: f64) -> Axis {
        let step = round_step(greatest.max(1e-9) / 4.0);
        let steps = (greatest / step).ceil().max(1.0) as u32;
        Axis {
            scale: Scale::Linear,
            low: 0.0,
            high: step * f64::from(steps),
            greatest,
            marks: (0..=steps).map(|mark| step * f64::from(mark)).collect(),
        }
    }

    fn logarithmic(values: impl Iterator<Item = f64>) -> Axis {
        let (low, high) = values
            .filter(|value| *value > 0.0)
            .fold((f64::MAX, 0.0_f64), |(low, high), value| {
                (low.min(value), high.max(value))
            });
        let (low, high) = if high > 0.0 {
            (low.log10().floor(), high.log10().ceil())
        } else {
            (0.0, 1.0)
        };
        let high = high.max(low + 1.0);
        Axis {
            scale: Scale::Logarithmic,
            low,
            high,
            greatest: 10f64.powf(high),
            marks: (low as i32..=high as i32)
                .map(|power| 10f64.powi(power))
                .collect(),
        }
    }

    /// Ends where the values do instead of at a round number.
    fn cut(mut self) -> Axis {
        if self.greatest > 0.0 {
            self.high = self.greatest;
            self.marks.retain(|mark| *mark <= self.greatest);
        }
        self
    }

    fn has(&self, value: f64) -> bool {
        value.is_finite() && (self.scale == Scale::Linear || value > 0.0)
    }

    fn share(&self, value: f64) -> f64 {
        let value = if self.scale == Scale::Logarithmic {
            value.log10()
        } else {
            value
        };
        (value - self.low) / (self.high - self.low)
    }
}

/// 1, 2 or 5 times a power of ten, not below `step`.
fn round_step(step: f64) -> f64 {
    let power = 10f64.powf(step.log10().floor());
    let factors = [1.0, 2.0, 5.0, 10.0];
    let found = factors
        .into_iter()
        .find(|factor| factor * power >= step * (1.0 - 1e-9));
    found.unwrap_or(10.0) * power
}

fn label(value: f64) -> String {
    if value >= 10_000.0 {
        format!("{}k", value / 1e3)
    } else {
        // Steps like 0.1 + 0.2 carry noise in the last digit.
        format!("{}", (value * 1e6).round() / 1e6)
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_end_at_round_numbers_above_all_values() {
        for (greatest, high) in [
            (0.0, 1e-9),
            (3.9, 4.0),
            (7.0, 8.0),
            (41_000.0, 60_000.0),
            (100.0, 100.0),
        ] {
            let axis = Axis::linear(greatest);
            assert!(
                axis.high >= greatest && (greatest == 0.0 || axis.high == high),
                "{greatest}: {}",
                axis.high
            );
        }
        let axis = Axis::logarithmic([0.0, 0.3, 40.0].into_iter());
        assert_eq!(axis.marks, [0.1, 1.0, 10.0, 100.0]);
        assert!((axis.share(10.0) - 2.0 / 3.0).abs() < 1e-12);
        assert!(!axis.has(0.0) && !axis.has(f64::NAN));
    }

    #[test]
    fn a_picture_has_each_line_in_each_panel_and_stays_inside() {
        let panel = |scale| Panel {
            title: "a < b & \"c\"".to_owned(),
            scale,
            lines: vec![
                Line {
                    name: "one".to_owned(),
                    points: vec![(1.0, 5.0), (2.0, 0.0), (3.0, 9.0)],
                },
                Line {
                    name: "none".to_owned(),
                    points: Vec::new(),
                },
            ],
        };
        let svg = Picture {
            title: "t".to_owned(),
            x_name: "s".to_owned(),
            panels: vec![panel(Scale::Linear), panel(Scale::Logarithmic)],
        }
        .svg();
        assert!(
            svg.contains("a &lt; b &amp; &quot;c&quot;") && !svg.contains("NaN"),
            "{svg}"
        );
        // Three points on the linear panel, two on the other; the empty line only in the legend.
        let lines: Vec<&str> = svg
            .lines()
            .filter(|line| line.contains("class=\"line") && !line.contains("h28"))
            .collect();
        assert_eq!(lines.len(), 2, "{svg}");
        assert_eq!(
            (lines[0].matches('L').count(), lines[1].matches('L').count()),
            (2, 1)
        );
        assert!(
            lines[0].contains(&format!("{:.1} {:.1}", WIDTH - RIGHT, TOP + PANEL * 0.1)),
            "{}",
            lines[0]
        );
    }
}
