// Package report is how all measurements are told: as Markdown tables, between marks in docs/benchmarks.md.
package report

import (
	"fmt"
	"os"
	"strings"
	"unicode/utf8"
)

// Table writes a Markdown table with its columns aligned, so that it can be read as it stands.
func Table(header []string, rows [][]string) string {
	width := make([]int, len(header))
	for _, row := range append([][]string{header}, rows...) {
		for i, cell := range row {
			width[i] = max(width[i], utf8.RuneCountInString(cell))
		}
	}
	var b strings.Builder
	line := func(row []string) {
		for i, cell := range row {
			fmt.Fprintf(&b, "| %s%s ", cell, strings.Repeat(" ", width[i]-utf8.RuneCountInString(cell)))
		}
		b.WriteString("|\n")
	}
	line(header)
	for _, w := range width {
		b.WriteString("| " + strings.Repeat("-", w) + " ")
	}
	b.WriteString("|\n")
	for _, row := range rows {
		line(row)
	}
	return b.String()
}

// The document marks where results go with a pair of comments; what is around them is written by hand.
func beginMark(name string) string { return "<!-- bench: " + name + " -->" }
func endMark(name string) string   { return "<!-- end: " + name + " -->" }

// replaceSection returns doc with the text between the marks of that name replaced.
func replaceSection(doc, name, text string) (string, error) {
	begin, end := beginMark(name), endMark(name)
	if strings.Count(doc, begin) != 1 || strings.Count(doc, end) != 1 {
		return "", fmt.Errorf("the document must have the marks %s and %s once each", begin, end)
	}
	before, rest, _ := strings.Cut(doc, begin)
	_, after, ok := strings.Cut(rest, end)
	if !ok {
		return "", fmt.Errorf("the document has the mark %s before %s", end, begin)
	}
	return before + begin + "\n" + strings.TrimRight(text, "\n") + "\n" + end + after, nil
}

// Section is a result by the name of its marks in the document.
type Section struct{ Name, Text string }

// Write puts results into the document. Sections that were not measured stay as they are.
func Write(path string, sections []Section) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	doc := string(data)
	for _, s := range sections {
		if doc, err = replaceSection(doc, s.Name, s.Text); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	if doc == string(data) {
		return nil
	}
	return os.WriteFile(path, []byte(doc), 0o644)
}
