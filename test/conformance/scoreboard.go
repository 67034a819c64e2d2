package main

import (
	"bytes"
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// The scoreboard is a part of a document that people write around it. It is its own memory: what an earlier run
// found is read from it, and stays until a run of the same setting finds something else.
const (
	boardBegin = "<!-- The scoreboard: `make conformance` writes from here ... -->"
	boardEnd   = "<!-- ... to here. -->"
)

// A section is the score of one setting.
type section struct {
	setting string
	version string // of Kubernetes
	date    string // of the last run
	total   tally  // how many specs there are
	results results
}

// tally counts specs: all, and those of the conformance suite.
type tally struct{ conformance, all int }

// record brings a run's results into the scoreboard.
func record(file string, s setting, version string, now time.Time, specs []string, ran results) error {
	doc, err := os.ReadFile(file)
	if err != nil {
		return fmt.Errorf("scoreboard: %w", err)
	}
	doc, err = update(doc, s, version, now.UTC().Format(time.DateOnly), specs, ran)
	if err != nil {
		return fmt.Errorf("scoreboard in %s: %w", file, err)
	}
	temp, err := os.CreateTemp(filepath.Dir(file), "."+filepath.Base(file)+"-*")
	if err != nil {
		return fmt.Errorf("scoreboard: %w", err)
	}
	defer os.Remove(temp.Name())
	if _, err := temp.Write(doc); err != nil {
		return fmt.Errorf("scoreboard: %w", err)
	}
	if err := temp.Chmod(0o644); err != nil {
		return fmt.Errorf("scoreboard: %w", err)
	}
	if err := temp.Close(); err != nil {
		return fmt.Errorf("scoreboard: %w", err)
	}
	return os.Rename(temp.Name(), file)
}

// checkBoard finds what would keep record from working.
func checkBoard(file string) error {
	doc, err := os.ReadFile(file)
	if err == nil {
		_, err = update(doc, setting{}, "", "", nil, nil)
	}
	if err != nil {
		return fmt.Errorf("scoreboard in %s: %w", file, err)
	}
	return nil
}

// update returns the document with a run's results in it. Only the rows of specs that the run is about change,
// unless the tests are of another version now: then what the old ones found says nothing any more.
func update(doc []byte, s setting, version, date string, specs []string, ran results) ([]byte, error) {
	before, rest, found := bytes.Cut(doc, []byte(boardBegin))
	if !found {
		return nil, fmt.Errorf("no line %q", boardBegin)
	}
	board, after, found := bytes.Cut(rest, []byte(boardEnd))
	if !found {
		return nil, fmt.Errorf("no line %q", boardEnd)
	}
	sections, err := parseBoard(string(board))
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(sections, func(old section) bool { return old.setting == s.String() })
	if i < 0 {
		i = len(sections)
		sections = append(sections, section{setting: s.String()})
	}
	sec := &sections[i]
	if sec.version != version {
		sec.results = nil
	}
	sec.version, sec.date, sec.total = version, date, count(specs)
	merged := map[string]result{}
	for _, r := range append(sec.results, ran...) {
		// What did not run this time, as what ALL=1 asks for, has the result that it had.
		if was, ok := merged[r.Spec]; ok && r.Outcome == leftOutOutcome && was.Outcome != leftOutOutcome {
			continue
		}
		merged[r.Spec] = r
	}
	sec.results = sec.results[:0]
	for _, spec := range specs {
		if r, ok := merged[spec]; ok {
			sec.results = append(sec.results, r)
		}
	}
	slices.SortFunc(sections, func(a, b section) int { return cmp.Compare(a.setting, b.setting) })
	var out bytes.Buffer
	out.Write(before)
	out.WriteString(boardBegin + "\n\n")
	for _, sec := range sections {
		sec.render(&out)
	}
	out.WriteString(boardEnd)
	out.Write(after)
	return out.Bytes(), nil
}

func isConformance(spec string) bool { return strings.Contains(spec, "[Conformance]") }

func count(specs []string) tally {
	t := tally{all: len(specs)}
	for _, s := range specs {
		if isConformance(s) {
			t.conformance++
		}
	}
	return t
}

// tallyOf counts the results with that outcome.
func (s section) tallyOf(o outcome) tally {
	var specs []string
	for _, r := range s.results {
		if r.Outcome == o {
			specs = append(specs, r.Spec)
		}
	}
	return count(specs)
}

func (s section) render(out *bytes.Buffer) {
	fmt.Fprintf(out, "### %s\n\nKubernetes %s, %s.\n\n", s.setting, s.version, s.date)
	out.WriteString("| | passed | failed | left out | not run | all |\n| --- | ---: | ---: | ---: | ---: | ---: |\n")
	p, f, l := s.tallyOf(passedOutcome), s.tallyOf(failedOutcome), s.tallyOf(leftOutOutcome)
	line := func(name string, of func(tally) int) {
		fmt.Fprintf(out, "| %s | %d | %d | %d | %d | %d |\n", name, of(p), of(f), of(l), of(s.total)-of(p)-of(f)-of(l), of(s.total))
	}
	line(rowConformance, func(t tally) int { return t.conformance })
	line(rowAll, func(t tally) int { return t.all })
	// What failed is seen at once.
	open := ""
	if f.all > 0 {
		open = " open"
	}
	fmt.Fprintf(out, "\n<details%s><summary>Each spec</summary>\n\n| spec | result | why |\n| --- | --- | --- |\n", open)
	order := map[outcome]int{failedOutcome: 0, passedOutcome: 1, leftOutOutcome: 2}
	sorted := slices.Clone(s.results)
	slices.SortStableFunc(sorted, func(a, b result) int { return cmp.Compare(order[a.Outcome], order[b.Outcome]) })
	for _, r := range sorted {
		fmt.Fprintf(out, "| %s | %s | %s |\n", escape(r.Spec), r.Outcome, escape(r.Why))
	}
	out.WriteString("\n</details>\n\n")
}

const (
	rowConformance = "`[Conformance]`"
	rowAll         = "all of sig-network"
)

// escape keeps a text in its cell. What stands in specs' names and messages is no HTML.
func escape(s string) string { return escaper.Replace(s) }

func unescape(s string) string { return unescaper.Replace(s) }

var (
	escaper   = strings.NewReplacer(`\`, `\\`, "|", `\|`, "<", "&lt;", "&", "&amp;")
	unescaper = strings.NewReplacer(`\\`, `\`, `\|`, "|", "&lt;", "<", "&amp;", "&")
)

var (
	headingLine = regexp.MustCompile(`^### (.+)$`)
	versionLine = regexp.MustCompile(`^Kubernetes (\S+), (\d{4}-\d\d-\d\d)\.$`)
	tallyLine   = regexp.MustCompile("^\\| (" + regexp.QuoteMeta(rowConformance) + "|" + regexp.QuoteMeta(rowAll) + `) \|.*\| (\d+) \|$`)
	resultLine  = regexp.MustCompile(`^\| (.+) \| (passed|failed|left out) \| (.*?) ?\|$`)
)

// parseBoard reads what render wrote. A line that it did not write is an error: it would be lost.
func parseBoard(board string) ([]section, error) {
	var sections []section
	n := 0
	for line := range strings.Lines(board) {
		n++
		line = strings.TrimSpace(line)
		if m := headingLine.FindStringSubmatch(line); m != nil {
			sections = append(sections, section{setting: m[1]})
			continue
		}
		if line == "" {
			continue
		}
		if len(sections) == 0 {
			return nil, fmt.Errorf("line %d of the scoreboard stands before any section: %q", n, line)
		}
		s := &sections[len(sections)-1]
		switch {
		case strings.HasPrefix(line, "| ---"), strings.HasPrefix(line, "| | passed"), strings.HasPrefix(line, "| spec |"),
			strings.HasPrefix(line, "<details"), line == "</details>":
		default:
			if m := versionLine.FindStringSubmatch(line); m != nil {
				s.version, s.date = m[1], m[2]
			} else if m := tallyLine.FindStringSubmatch(line); m != nil {
				v, _ := strconv.Atoi(m[2])
				if m[1] == rowAll {
					s.total.all = v
				} else {
					s.total.conformance = v
				}
			} else if m := resultLine.FindStringSubmatch(line); m != nil {
				s.results = append(s.results, result{Spec: unescape(m[1]), Outcome: outcome(m[2]), Why: unescape(m[3])})
			} else {
				return nil, fmt.Errorf("line %d of the scoreboard is not one that a run wrote: %q", n, line)
			}
		}
	}
	return sections, nil
}
