package doctor

import (
	"fmt"
	"io"
	"strings"
)

// Write renders the checks as a table for people. Every status is a word. verbose lists the checks that are fine, too;
// otherwise only their number is shown.
func Write(w io.Writer, checks []Check, verbose bool) error {
	width := 0
	for _, c := range checks {
		if verbose || c.Status != OK {
			width = max(width, len(c.Name))
		}
	}
	var b strings.Builder
	category := ""
	count := map[Status]int{}
	for _, c := range checks {
		count[c.Status]++
		if c.Status == OK && !verbose {
			continue
		}
		if c.Category != category {
			if category != "" {
				b.WriteString("\n")
			}
			category = c.Category
			fmt.Fprintf(&b, "%s\n", strings.ToUpper(category))
		}
		fmt.Fprintf(&b, "  %-4s  %-*s  %s\n", c.Status, width, c.Name, c.Found)
		if c.Remedy != "" {
			fmt.Fprintf(&b, "  %4s  %-*s  -> %s\n", "", width, "", c.Remedy)
		}
	}
	if category != "" {
		b.WriteString("\n")
	}
	fmt.Fprintf(&b, "%d ok, %d warn, %d fail: %s\n", count[OK], count[Warn], count[Fail], verdict(count))
	_, err := io.WriteString(w, b.String())
	return err
}

func verdict(count map[Status]int) string {
	switch {
	case count[Fail] > 0:
		return "a lab does not start here until the failures are fixed"
	case count[Warn] > 0:
		return "a lab starts here; the warnings say what does not work in it"
	}
	return "a lab starts here"
}
