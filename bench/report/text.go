package report

import (
	"regexp"
	"strings"
)

var (
	// between stands between two cells of a row: three spaces or more, as the program fathom prints its tables, or a tab.
	between = regexp.MustCompile(`\t| {3,}`)
	// build is what a kernel's name says of who built it, which is nobody's business.
	build = regexp.MustCompile(`(Linux [0-9.]+)-[^, ]*`)
)

// FromText makes Markdown of what a measurement has printed for a terminal: of the lines with several cells, up to the next
// empty line, a table, whose header is the first, and of the others a list below it. What is Markdown stays as it is.
func FromText(text string) string {
	var parts []string
	for block := range strings.SplitSeq(build.ReplaceAllString(text, "$1"), "\n\n") {
		var rows [][]string
		var ready, notes strings.Builder
		for line := range strings.SplitSeq(strings.Trim(block, "\n"), "\n") {
			line = strings.TrimRight(line, " ")
			switch cells := between.Split(line, -1); {
			case strings.HasPrefix(line, "| "):
				ready.WriteString(line + "\n")
			case len(cells) > 1:
				for i := range cells {
					cells[i] = strings.ReplaceAll(cells[i], "|", `\|`)
				}
				rows = append(rows, cells)
			case line != "":
				notes.WriteString("- " + strings.TrimPrefix(line, "- ") + "\n")
			}
		}
		if len(rows) > 0 {
			ready.WriteString(Table(rows[0], rows[1:]))
		}
		for _, part := range []string{ready.String(), notes.String()} {
			if part != "" {
				parts = append(parts, part)
			}
		}
	}
	return strings.Join(parts, "\n")
}
