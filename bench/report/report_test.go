package report

import (
	"os"
	"strings"
	"testing"
)

func TestReplaceSection(t *testing.T) {
	doc := "# Title\n" + beginMark("a") + "\nold\n" + endMark("a") + "\nbetween\n" + beginMark("b") + "\n" + endMark("b") + "\n"
	got, err := replaceSection(doc, "a", "new\n\n")
	if err != nil {
		t.Fatal(err)
	}
	if want := strings.Replace(doc, "old", "new", 1); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if again, err := replaceSection(got, "a", "new"); err != nil || again != got {
		t.Errorf("not the same when it is repeated: %q, %v", again, err)
	}
	for name, doc := range map[string]string{
		"missing": "", "no end": beginMark("a"), "twice": doc + doc, "reversed": endMark("a") + beginMark("a"),
	} {
		if _, err := replaceSection(doc, "a", "new"); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// Every section that a run writes has its place in the document.
func TestDocumentHasTheMarks(t *testing.T) {
	data, err := os.ReadFile("../../docs/benchmarks.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"machine", "time", "processor", "memory", "disk", "timeline", "settings", "many", "pods", "services", "dns"} {
		if _, err := replaceSection(string(data), name, ""); err != nil {
			t.Error(err)
		}
	}
}

func TestFromText(t *testing.T) {
	text := `WHERE       WAY         RR
same node   veth pair   23425 /s
same node   fathom      -

WHAT	RATE
CoreDNS alone	19444/s
flood: 155993 questions in 13 s
new | names	11313/s

2026-11-22, Linux 6.18.44-lab, 2 processors
missed: same node, fathom: RR is 0.85
`
	want := `| WHERE     | WAY       | RR       |
| --------- | --------- | -------- |
| same node | veth pair | 23425 /s |
| same node | fathom    | -        |

| WHAT          | RATE    |
| ------------- | ------- |
| CoreDNS alone | 19444/s |
| new \| names  | 11313/s |

- flood: 155993 questions in 13 s

- 2026-11-22, Linux 6.18.44, 2 processors
- missed: same node, fathom: RR is 0.85
`
	got := FromText(text)
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if again := FromText(got); again != got {
		t.Errorf("Markdown does not stay as it is:\n%s", again)
	}
}
