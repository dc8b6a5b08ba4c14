//! Plots as SVG: completion and origin traffic over the cluster's size, progress of every node over time.
//!
//! Written by hand: three kinds of line in two frames need no plotting library.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use windlass::swarm::Config;

use crate::figures::Figures;
use crate::grid::{CONTENT_GIB, Case, cases};
use crate::simulation::Scenario;

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 150.0;
const TOP: f64 = 44.0;
const BOTTOM: f64 = 52.0;
const COLOURS: [&str; 5] = ["#2563eb", "#d97706", "#059669", "#7c3aed", "#dc2626"];

/// A frame with its axes, in data coordinates.
struct Plot {
    svg: String,
    x: (f64, f64),
    y: (f64, f64),
    logarithmic: bool,
    legends: usize,
}

/// Runs what is plotted and writes `benches/figures/*.svg`.
pub(crate) fn draw(nodes: &[usize]) {
    let plotted = ["burst", "burst R=40", "warm"];
    let mut figures = Vec::new();
    for nodes in nodes {
        for case in cases(*nodes, CONTENT_GIB, &Config::default())
            .into_iter()
            .filter(|case| plotted.contains(&case.name))
        {
            figures.push(Figures::of(&case));
            println!("{}", figures[figures.len() - 1].row());
        }
    }
    let last = *nodes.last().unwrap_or(&2) as f64;
    let series = |name: &str, value: &dyn Fn(&Figures) -> f64| -> Vec<(f64, f64)> {
        figures.iter().filter(|f| f.name == name).map(|f| (f.nodes as f64, value(f))).collect()
    };
    let mut time =
        Plot::new("Last node's completion ÷ lower bound, 16 GiB", "nodes", (2.0, last), (1.0, 1.25), true);
    let mut origin =
        Plot::new("Bytes from the origin ÷ content, 16 GiB", "nodes", (2.0, last), (0.0, 2.0), true);
    for name in plotted {
        time.line(name, &series(name, &Figures::ratio));
        origin.line(name, &series(name, &|f| f.outcome.origin_ratio));
    }
    save("completion.svg", time);
    save("origin.svg", origin);
    save("progress.svg", progress());
}

/// A burst of 32 nodes.
fn progress() -> Plot {
    let mut scenario = Scenario::burst(32, 512);
    scenario.sample = 20_000;
    let bound_s = scenario.bound_s();
    let case = Case { name: "burst", scenario };
    let figures = Figures::of(&case);
    let end = figures.outcome.last_s * 1.02;
    let title = "Share of 4 GiB held by each of 32 nodes over time";
    let mut plot = Plot::new(title, "seconds", (0.0, end), (0.0, 1.0), false);
    let samples = &figures.outcome.samples;
    for n in 0..32 {
        let points: Vec<_> = samples.iter().map(|(at, shares)| (*at, f64::from(shares[n]))).collect();
        plot.path(&points, "#2563eb", 0.25);
    }
    plot.legend("each node", "#2563eb");
    plot.path(&[(0.0, 0.0), (bound_s, 1.0)], "#dc2626", 0.9);
    plot.legend("lower bound", "#dc2626");
    plot
}

fn save(name: &str, plot: Plot) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/figures");
    let path = folder.join(name);
    match fs::create_dir_all(&folder).and_then(|()| fs::write(&path, plot.finish())) {
        Ok(()) => println!("wrote {}", path.display()),
        Err(error) => println!("{} not written: {error}", path.display()),
    }
}

impl Plot {
    fn new(title: &str, x_label: &str, x: (f64, f64), y: (f64, f64), logarithmic: bool) -> Self {
        let mut plot = Self { svg: String::new(), x, y, logarithmic, legends: 0 };
        let _ = writeln!(
            plot.svg,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" \
             font-size=\"13\">\n<rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>"
        );
        plot.text(LEFT, 24.0, "start", &format!("<tspan font-weight=\"bold\">{title}</tspan>"));
        plot.text((LEFT + WIDTH - RIGHT) / 2.0, HEIGHT - 12.0, "middle", x_label);
        plot.axes();
        plot
    }

    fn axes(&mut self) {
        for step in 0..=5 {
            let value = self.y.0 + (self.y.1 - self.y.0) * f64::from(step) / 5.0;
            let y = self.at_y(value);
            self.stroke(&[(LEFT, y), (WIDTH - RIGHT, y)], "#e5e7eb", 1.0);
            self.text(LEFT - 8.0, y + 4.0, "end", &format!("{value:.2}"));
        }
        let ticks: Vec<f64> = if self.logarithmic {
            [2.0, 8.0, 32.0, 128.0, 512.0, 2_000.0].into_iter().filter(|n| *n <= self.x.1).collect()
        } else {
            (0..=5).map(|step| self.x.1 * f64::from(step) / 5.0).collect()
        };
        for value in ticks {
            let x = self.at_x(value);
            let label = if self.logarithmic { format!("{value}") } else { format!("{value:.2}") };
            self.text(x, HEIGHT - BOTTOM + 20.0, "middle", &label);
        }
    }

    fn line(&mut self, name: &str, points: &[(f64, f64)]) {
        let colour = COLOURS[self.legends % COLOURS.len()];
        self.path(points, colour, 1.0);
        for (x, y) in points {
            let (x, y) = (self.at_x(*x), self.at_y(*y));
            let _ = writeln!(self.svg, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\" fill=\"{colour}\"/>");
        }
        self.legend(name, colour);
    }

    fn legend(&mut self, name: &str, colour: &str) {
        let y = TOP + 14.0 + 22.0 * self.legends as f64;
        self.legends += 1;
        self.stroke(&[(WIDTH - RIGHT + 16.0, y), (WIDTH - RIGHT + 40.0, y)], colour, 1.0);
        self.text(WIDTH - RIGHT + 46.0, y + 4.0, "start", name);
    }

    fn path(&mut self, points: &[(f64, f64)], colour: &str, opacity: f64) {
        let points: Vec<_> = points.iter().map(|(x, y)| (self.at_x(*x), self.at_y(*y))).collect();
        self.stroke(&points, colour, opacity);
    }

    fn stroke(&mut self, points: &[(f64, f64)], colour: &str, opacity: f64) {
        let points: Vec<_> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        let _ = writeln!(
            self.svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\" stroke-opacity=\"{opacity}\"/>",
            points.join(" ")
        );
    }

    fn text(&mut self, x: f64, y: f64, anchor: &str, text: &str) {
        let _ = writeln!(
            self.svg,
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" fill=\"#111827\">{text}</text>"
        );
    }

    fn at_x(&self, value: f64) -> f64 {
        let scale = |value: f64| if self.logarithmic { value.max(1.0).ln() } else { value };
        let share = (scale(value) - scale(self.x.0)) / (scale(self.x.1) - scale(self.x.0)).max(1e-9);
        LEFT + share * (WIDTH - LEFT - RIGHT)
    }

    fn at_y(&self, value: f64) -> f64 {
        let share = (value.clamp(self.y.0, self.y.1) - self.y.0) / (self.y.1 - self.y.0);
        HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)
    }

    fn finish(mut self) -> String {
        self.svg.push_str("</svg>\n");
        self.svg
    }
}
