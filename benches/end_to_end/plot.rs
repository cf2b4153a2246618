//! Bars, side by side, as SVG: small enough to be written by hand.

use std::fmt::Write as _;

use crate::report::figure;

pub struct Row {
    pub label: &'static str,
    pub pgbouncer: f64,
    pub pglobby: f64,
}

const WIDTH: f64 = 860.0;
const LEFT: f64 = 170.0;
const ROW: f64 = 34.0;
const BAR: f64 = 12.0;
const TOP: f64 = 62.0;
/// A bar this many times PgBouncer's is cut.
const RATIO_MAX: f64 = 2.5;

/// Every row to its own scale, PgBouncer's bar being 1; the figures stand behind the bars.
pub fn ratios(title: &str, unit: &str, rows: &[Row]) -> String {
    let height = TOP + ROW * rows.len() as f64 + 16.0;
    let scale = (WIDTH - LEFT - 110.0) / RATIO_MAX;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#ffffff\"/>\n\
         <text x=\"16\" y=\"24\" font-size=\"16\" font-weight=\"bold\">{title}</text>\n\
         <text x=\"16\" y=\"44\" fill=\"#555555\">{unit}; each row relative to PgBouncer</text>\n\
         <rect x=\"640\" y=\"14\" width=\"12\" height=\"12\" fill=\"{PGBOUNCER}\"/><text x=\"658\" y=\"24\">PgBouncer</text>\n\
         <rect x=\"740\" y=\"14\" width=\"12\" height=\"12\" fill=\"{PGLOBBY}\"/><text x=\"758\" y=\"24\">pglobby</text>\n"
    );
    for (at, row) in rows.iter().enumerate() {
        let y = TOP + ROW * at as f64;
        let ratio = if row.pgbouncer > 0.0 { row.pglobby.max(0.0) / row.pgbouncer } else { RATIO_MAX };
        let _ = writeln!(
            svg,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>",
            LEFT - 8.0,
            y + 17.0,
            row.label
        );
        for (offset, ratio, value, colour, words) in [
            (0.0, 1.0, row.pgbouncer, PGBOUNCER, String::new()),
            (BAR + 1.0, ratio, row.pglobby, PGLOBBY, format!(" (× {ratio:.2})")),
        ] {
            let length = ratio.min(RATIO_MAX) * scale;
            let _ = writeln!(
                svg,
                "<rect x=\"{LEFT}\" y=\"{}\" width=\"{length:.1}\" height=\"{BAR}\" fill=\"{colour}\"/>\
                 <text x=\"{:.1}\" y=\"{}\" font-size=\"11\">{}{words}</text>",
                y + offset,
                LEFT + length + 5.0,
                y + offset + 10.0,
                figure(value),
            );
        }
    }
    let _ = writeln!(
        svg,
        "<line x1=\"{x}\" x2=\"{x}\" y1=\"{}\" y2=\"{}\" stroke=\"#888888\" stroke-dasharray=\"3 3\"/>\n</svg>",
        TOP - 6.0,
        height - 10.0,
        x = LEFT + scale,
    );
    svg
}

const PGBOUNCER: &str = "#b0b7c3";
const PGLOBBY: &str = "#2f6fde";
