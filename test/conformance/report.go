package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strings"
)

type outcome string

const (
	passedOutcome  outcome = "passed"
	failedOutcome  outcome = "failed"
	leftOutOutcome outcome = "left out"
)

// A result is what became of one spec.
type result struct {
	Spec    string
	Outcome outcome
	Why     string // of a failure or of leaving out
}

type results []result

// sig is what the names of all specs here begin with; it is taken off everywhere else.
const sig = "[sig-network] "

// errInterrupted says that specs were not brought to an end, so that they have no result.
var errInterrupted = errors.New("the tests were interrupted")

// readReport reads ginkgo's report in JSON. Specs that were not asked for are not in the results; one that asked
// the cluster and stepped aside by itself is left out, with the reason that it gave.
func readReport(r io.Reader) (results, error) {
	var suites []struct {
		SpecialSuiteFailureReasons []string
		SpecReports                []struct {
			ContainerHierarchyTexts []string
			LeafNodeType            string
			LeafNodeText            string
			State                   string
			Failure                 struct {
				Message  string
				Location struct {
					FileName   string
					LineNumber int
				}
			}
		}
	}
	if err := json.NewDecoder(r).Decode(&suites); err != nil {
		return nil, fmt.Errorf("read the report of the tests: %w", err)
	}
	var found results
	for _, s := range suites {
		for _, spec := range s.SpecReports {
			name := strings.Join(append(spec.ContainerHierarchyTexts, spec.LeafNodeText), " ")
			message := firstLine(spec.Failure.Message)
			if spec.LeafNodeType != "It" {
				// What runs before all specs: the cluster is not as the suite wants it.
				if spec.State != "passed" && spec.State != "skipped" {
					return nil, fmt.Errorf("the tests did not begin: %s: %s", spec.LeafNodeType, message)
				}
				continue
			}
			name, ours := strings.CutPrefix(name, sig)
			if !ours {
				continue
			}
			switch spec.State {
			case "passed":
				found = append(found, result{Spec: name, Outcome: passedOutcome})
			case "skipped":
				if message != "" {
					found = append(found, result{Spec: name, Outcome: leftOutOutcome, Why: "upstream: " + message})
				}
			case "pending":
				found = append(found, result{Spec: name, Outcome: leftOutOutcome, Why: "upstream has it pending"})
			case "interrupted", "aborted":
				return nil, fmt.Errorf("%w: %s", errInterrupted, name)
			default: // failed, panicked, timedout
				l := spec.Failure.Location
				file := l.FileName[strings.LastIndex(l.FileName, "/")+1:]
				if message == "" {
					message = spec.State
				}
				found = append(found, result{Spec: name, Outcome: failedOutcome, Why: fmt.Sprintf("%s (%s:%d)", message, file, l.LineNumber)})
			}
		}
		for _, why := range s.SpecialSuiteFailureReasons {
			if strings.Contains(why, "Interrupted") || strings.Contains(why, "Timeout") {
				return nil, fmt.Errorf("%w: %s", errInterrupted, why)
			}
		}
	}
	return found, nil
}

var space = regexp.MustCompile(`\s+`)

// firstLine is the beginning of a message, short enough for a table.
func firstLine(message string) string {
	const limit = 160
	for line := range strings.Lines(message) {
		line = space.ReplaceAllString(strings.TrimSpace(line), " ")
		if line == "" {
			continue
		}
		if runes := []rune(line); len(runes) > limit {
			line = string(runes[:limit]) + "…"
		}
		return line
	}
	return ""
}
