package main

import (
	"fmt"
	"slices"

	"github.com/fathom-network/fathom/bench/report"
)

// A sample is what the rounds gave for one figure.
type sample []float64

func (s sample) min() float64 { return slices.Min(s) }
func (s sample) max() float64 { return slices.Max(s) }

// median is the middle value, or the mean of the two in the middle.
func (s sample) median() float64 {
	sorted := slices.Sorted(slices.Values(s))
	mid := len(sorted) / 2
	if len(sorted)%2 == 1 {
		return sorted[mid]
	}
	return (sorted[mid-1] + sorted[mid]) / 2
}

// nearest is the round whose value is nearest to the median: the one to show as an example.
func (s sample) nearest() int {
	m, best := s.median(), 0
	for i, v := range s {
		if abs(v-m) < abs(s[best]-m) {
			best = i
		}
	}
	return best
}

func abs(v float64) float64 { return max(v, -v) }

// per divides round by round. The median of the ratios is the figure, not the ratio of the medians: what a
// busy machine does to one round it does to both sides of it.
func (s sample) per(base sample) sample {
	var ratios sample
	for i := range min(len(s), len(base)) {
		ratios = append(ratios, s[i]/base[i])
	}
	return ratios
}

// A figure is a row of a table of results.
type figure struct {
	what   string
	unit   string // s, CPU-s, MB, or empty for a ratio
	limit  float64
	sample sample
}

var figureHeader = []string{"what", "median", "min", "max", "at most"}

func (f figure) row() []string {
	limit := ""
	if f.limit > 0 {
		limit = fmt.Sprintf("%g", f.limit)
		if f.unit != "" {
			limit += " " + f.unit
		}
		if f.sample.median() > f.limit {
			limit += " (missed)"
		}
	}
	return []string{f.what, f.format(f.sample.median()), f.format(f.sample.min()), f.format(f.sample.max()), limit}
}

func (f figure) format(v float64) string {
	digits := 2
	switch {
	case v >= 100:
		digits = 0
	case v >= 10 || f.unit == "MB":
		digits = 1
	}
	s := fmt.Sprintf("%.*f", digits, v)
	if f.unit != "" {
		s += " " + f.unit
	}
	return s
}

func figureTable(figures []figure) string {
	var rows [][]string
	for _, f := range figures {
		if len(f.sample) > 0 {
			rows = append(rows, f.row())
		}
	}
	return report.Table(figureHeader, rows)
}
