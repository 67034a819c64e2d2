package main

import (
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestRecord(t *testing.T) {
	file := filepath.Join(t.TempDir(), "terminal.svg")
	if err := run(file, 3, []string{"echo 'a <b> & c'", "seq 9; echo last >&2"}); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var texts []string
	d := xml.NewDecoder(strings.NewReader(string(data)))
	for in := ""; ; {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		switch x := token.(type) {
		case xml.StartElement:
			in = x.Name.Local
		case xml.EndElement:
			in = ""
		case xml.CharData:
			if in == "text" {
				texts = append(texts, string(x))
			}
		}
	}
	want := "# echo 'a <b> & c'|a <b> & c|# seq 9; echo last >&2|...|9|last"
	if got := strings.Join(texts, "|"); got != want {
		t.Errorf("drawn is %q, want %q", got, want)
	}
	if err := run(file, 3, []string{"exit 3"}); err == nil {
		t.Error("a command that fails is drawn")
	}
}
