package svcbench

import (
	"fmt"
	"strconv"
	"strings"
)

// Header has the columns of Rows, in order.
const Header = "SERVICES ENDPOINTS PROXY CRR RR BARE START PROGRAM CHANGE-P50 CHANGE-P99 CPU MEMORY KERNEL"

// Rows formats the results for people.
func (r Report) Rows() (rows [][]string) {
	number := func(format string, v float64) string {
		if v == 0 {
			return ""
		}
		return fmt.Sprintf(format, v)
	}
	for _, x := range r.Results {
		row := []string{strconv.Itoa(x.Services), strconv.Itoa(x.Endpoints), x.Proxy}
		for _, ratio := range []Ratio{x.CRR, x.RR, x.Bare} {
			row = append(row, number("%.2f", ratio.Median))
		}
		row = append(row, number("%.2f s", x.Start), number("%.3f s", x.Program), number("%.1f ms", x.P50), number("%.1f ms", x.P99),
			number("%.0f%%", x.CPU), number("%.0f MB", x.Memory), number("%.0f MB", x.Kernel))
		rows = append(rows, row)
	}
	return rows
}

// Notes are the remarks needed to read the rows.
func (r Report) Notes() []string {
	notes := []string{fmt.Sprintf("%s, Linux %s, %d processors, load average %.1f at the start", r.Date, r.Kernel, r.CPUs, r.Load)}
	if r.StandIn {
		notes = append(notes, "there is no kit, so a stand-in takes the place of the API server")
	}
	for _, x := range r.Results {
		switch {
		case x.Note != "":
			notes = append(notes, fmt.Sprintf("%d x %d, %s: %s", x.Services, x.Endpoints, x.Proxy, x.Note))
		case x.ChangeRate < 90:
			notes = append(notes, fmt.Sprintf("%d x %d, %s: CPU is of %.0f changes a second, the machine did no more", x.Services, x.Endpoints, x.Proxy, x.ChangeRate))
		}
		if x.Start > 0 && x.Changes < 100 {
			notes = append(notes, fmt.Sprintf("%d x %d, %s: p99 is of %d changes", x.Services, x.Endpoints, x.Proxy, x.Changes))
		}
	}
	return notes
}

// Missed lists the goals of Fathom's own proxy that a run has missed: docs/benchmarks.md.
func (r Report) Missed() (missed []string) {
	for _, x := range r.Results {
		for _, goal := range []struct {
			what     string
			of       string // the proxy; empty means both of Fathom's
			size     Size   // zero means all
			is, want float64
			least    bool
		}{
			{"CRR of direct", Connect, Size{}, x.CRR.Median, 0.95, true},
			{"CRR of direct", NFTables, Size{}, x.CRR.Median, 0.86, true},
			{"seconds to program", "", Size{10_000, 10}, x.Program, 1, false},
			{"seconds to program", "", Size{50_000, 5}, x.Program, 3, false},
			{"ms from change to effect, p99", "", Size{10_000, 10}, x.P99, 10, false},
			{"ms from change to effect, p99", "", Size{50_000, 5}, x.P99, 20, false},
			{"MB of memory", "", Size{10_000, 10}, x.Memory, 150, false},
		} {
			if x.Start == 0 || isPeer(x.Proxy) || goal.of != "" && goal.of != x.Proxy || goal.size != (Size{}) && goal.size != x.Size {
				continue
			}
			if goal.least && goal.is < goal.want || !goal.least && goal.is > goal.want {
				word := "at most"
				if goal.least {
					word = "at least"
				}
				missed = append(missed, fmt.Sprintf("%d x %d, %s: %s: %.2f, the goal is %s %v", x.Services, x.Endpoints, x.Proxy, goal.what, goal.is, word, goal.want))
			}
		}
	}
	return missed
}

// ParseSizes parses sizes as people write them: 10x10,1000x10.
func ParseSizes(words []string) (sizes []Size, err error) {
	for _, w := range words {
		services, endpoints, found := strings.Cut(w, "x")
		if !found {
			endpoints = "10"
		}
		s, errS := strconv.Atoi(services)
		e, errE := strconv.Atoi(endpoints)
		if errS != nil || errE != nil || s < 2 || e < 1 || s > 500_000 || e > 100 || s*e > 1<<21-2 {
			return nil, fmt.Errorf("size %q: want SERVICESxENDPOINTS, such as 1000x10, with at most 100 endpoints each", w)
		}
		sizes = append(sizes, Size{s, e})
	}
	return sizes, nil
}
