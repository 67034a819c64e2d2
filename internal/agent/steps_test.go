package agent

import (
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestStepsDocumented holds the table of the design page to the list of steps.
func TestStepsDocumented(t *testing.T) {
	const path = "../../docs/design/agent.md"
	page, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	_, table, found := strings.Cut(string(page), "| step | what |\n| --- | --- |\n")
	if !found {
		t.Fatalf("%s has no table of steps", path)
	}
	table, _, _ = strings.Cut(table, "\n\n")
	var told, names []string
	for row := range strings.Lines(table) {
		name, what, _ := strings.Cut(strings.TrimPrefix(row, "| "), " | ")
		if strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(what), "|")) == "" {
			t.Errorf("%s does not say what the step %q does", path, name)
		}
		told = append(told, name)
	}
	for _, s := range steps {
		names = append(names, s.name)
	}
	if !slices.Equal(told, names) {
		t.Errorf("%s tells of the steps\n%s\nand a pass has\n%s", path, strings.Join(told, ", "), strings.Join(names, ", "))
	}
}

// TestStepsOrder: after a failure only those steps are run that are to be run despite it, and after the end none.
func TestStepsOrder(t *testing.T) {
	bad := errors.New("bad")
	for name, tc := range map[string]struct {
		of              map[string]outcome
		want            string
		failed, problem string
	}{
		"all well":      {nil, "a b c d", "", ""},
		"a problem":     {map[string]outcome{"a": {problems: []string{"p"}}}, "a b c d", "", "p"},
		"a failure":     {map[string]outcome{"a": {err: bad}}, "a c", "a", ""},
		"two failures":  {map[string]outcome{"a": {err: bad}, "c": {err: bad, problems: []string{"p"}}}, "a c", "a c", "p"},
		"the last":      {map[string]outcome{"d": {err: bad}}, "a b c d", "d", ""},
		"an end":        {map[string]outcome{"b": {ends: true}}, "a b", "", ""},
		"failed at end": {map[string]outcome{"a": {err: bad, ends: true}}, "a", "a", ""},
	} {
		var ran, observed []string
		var list []step
		for _, n := range []string{"a", "b", "c", "d"} {
			list = append(list, step{n, n == "c", func(*Agent, context.Context, *pass) outcome {
				ran = append(ran, n)
				return tc.of[n]
			}})
		}
		p := &pass{}
		runSteps(t.Context(), nil, list, p, func(n string, _ time.Duration) { observed = append(observed, n) })
		if got := strings.Join(ran, " "); got != tc.want || !slices.Equal(ran, observed) {
			t.Errorf("%s: ran %s, observed %v; want %s", name, got, observed, tc.want)
		}
		if strings.Join(p.failed, " ") != tc.failed || strings.Join(p.problems, " ") != tc.problem {
			t.Errorf("%s: failed %v, problems %v; want %s and %s", name, p.failed, p.problems, tc.failed, tc.problem)
		}
		if err := errors.Join(p.errs...); (err != nil) != (tc.failed != "") || err != nil && (!errors.Is(err, bad) || !strings.Contains(err.Error(), `step "`+p.failed[0]+`"`)) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestStepMetrics: each step has a series of its own before the first pass, and there is no other.
func TestStepMetrics(t *testing.T) {
	m := newMetrics("n1")
	m.stepped(steps[0].name, time.Second)
	families, err := m.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	counted := map[string]uint64{}
	for _, f := range families {
		if f.GetName() != "fathom_agent_step_seconds" {
			continue
		}
		for _, series := range f.GetMetric() {
			for _, l := range series.GetLabel() {
				if l.GetName() == "step" {
					counted[l.GetValue()] = series.GetHistogram().GetSampleCount()
				}
			}
		}
	}
	for i, s := range steps {
		if n, found := counted[s.name]; !found || (n == 1) != (i == 0) {
			t.Errorf("step %q: %d passes were timed, series there: %v", s.name, n, found)
		}
	}
	if len(counted) != len(steps) {
		t.Errorf("%d series for %d steps", len(counted), len(steps))
	}
}
