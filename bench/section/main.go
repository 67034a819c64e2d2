// Command section puts what a measurement has printed into docs/benchmarks.md, as tables: `go run ./bench/section NAME FILE`. NAME is
// that of a pair of marks in the document. The tables go to standard output, too.
package main

import (
	"fmt"
	"os"

	"github.com/fathom-network/fathom/bench/report"
)

const document = "docs/benchmarks.md"

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: section NAME FILE")
		os.Exit(2)
	}
	text, err := os.ReadFile(os.Args[2])
	if err == nil {
		tables := report.FromText(string(text))
		fmt.Print(tables)
		err = report.Write(document, []report.Section{{Name: os.Args[1], Text: tables}})
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "section:", err)
		os.Exit(1)
	}
}
