// Record runs commands in a shell, one after the other, and draws what they print as a terminal, in an SVG that plays as it
// went: each line comes when it came, but no pause is longer than a second. The README's is made by `make picture`.
//
//	go run ./docs/pictures/record -o docs/pictures/terminal.svg 'fathom up' 'fathom ls'
//
// Asciinema and a renderer would need two more programs on the machine, and a browser to play what they record.
package main

import (
	"bufio"
	"errors"
	"flag"
	"fmt"
	"html"
	"io"
	"os"
	"os/exec"
	"strings"
	"time"
)

const (
	columns   = 118
	charWidth = 7.2 // of the 12 pixels high monospaced font
	lineSpace = 16
	longest   = time.Second            // a pause
	typing    = 700 * time.Millisecond // before a command's first line
	reading   = 6 * time.Second        // at the end
)

// line is what stands in one line of the terminal, and when it came.
type line struct {
	at      time.Duration
	text    string
	command bool
}

// when is the tenth of a percent of all the time at which the line comes.
func (l line) when(total time.Duration) int64 {
	return l.at.Milliseconds() * 1000 / total.Milliseconds()
}

func main() {
	output := flag.String("o", "docs/pictures/terminal.svg", "the `file` to write")
	most := flag.Int("lines", 14, "how many lines of a command's output are shown, at most")
	flag.Parse()
	if err := run(*output, *most, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "record:", err)
		os.Exit(1)
	}
}

func run(output string, most int, commands []string) error {
	if len(commands) == 0 {
		return errors.New("name the commands to run, each as one argument")
	}
	var lines []line
	at := time.Duration(0)
	for _, c := range commands {
		lines = append(lines, line{at, c, true})
		at += typing
		of, err := record(c, at, most)
		if err != nil {
			return err
		}
		lines = append(lines, of...)
		if n := len(of); n > 0 {
			at = of[n-1].at
		}
		at += longest
	}
	return os.WriteFile(output, []byte(draw(lines)), 0o644)
}

// record runs a command and returns the last lines that it prints.
func record(command string, at time.Duration, most int) ([]line, error) {
	cmd := exec.Command("sh", "-c", command)
	r, w := io.Pipe()
	cmd.Stdout, cmd.Stderr = w, w
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("run %q: %w", command, err)
	}
	ended := make(chan error, 1)
	go func() {
		ended <- cmd.Wait()
		w.Close()
	}()
	var lines []line
	last := time.Now()
	for s := bufio.NewScanner(r); s.Scan(); {
		at += min(time.Since(last), longest)
		last = time.Now()
		lines = append(lines, line{at: at, text: s.Text()})
	}
	if err := <-ended; err != nil {
		return nil, fmt.Errorf("run %q: %w", command, err)
	}
	if n := len(lines); n > most {
		lines = append([]line{{at: lines[n-most].at, text: "..."}}, lines[n-most+1:]...)
	}
	return lines, nil
}

// draw returns the SVG. Each line is invisible until its time comes; then all stays for a while, and begins again.
func draw(lines []line) string {
	const margin, bar = 14, 26
	total := lines[len(lines)-1].at + reading
	width, height := columns*charWidth+2*margin, bar+len(lines)*lineSpace+2*margin
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" xml:space="preserve" viewBox="0 0 %.0f %d" font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace" font-size="12">`+"\n", width, height)
	fmt.Fprintf(&b, "<style>text{fill:#d7dae0;white-space:pre}.c{fill:#8fd694;font-weight:bold}@media (prefers-reduced-motion:no-preference){text{opacity:0;animation:%.1fs infinite}", total.Seconds())
	shown := map[int64]bool{}
	for _, l := range lines {
		percent := l.when(total)
		if !shown[percent] {
			shown[percent] = true
			fmt.Fprintf(&b, "@keyframes t%d{0%%,%.1f%%{opacity:0}%.1f%%,99%%{opacity:1}100%%{opacity:0}}", percent, float64(percent)/10, float64(percent)/10+0.1)
		}
	}
	b.WriteString("}</style>\n")
	fmt.Fprintf(&b, `<rect width="100%%" height="100%%" rx="8" fill="#1d2027"/><g fill="#565b66"><circle cx="18" cy="14" r="5"/><circle cx="35" cy="14" r="5"/><circle cx="52" cy="14" r="5"/></g>`+"\n")
	for i, l := range lines {
		text, class := l.text, ""
		if l.command {
			text, class = "# "+text, ` class="c"`
		}
		if r := []rune(text); len(r) > columns {
			text = string(r[:columns-1]) + "…"
		}
		fmt.Fprintf(&b, `<text x="%d" y="%d"%s style="animation-name:t%d">%s</text>`+"\n", margin, bar+margin+i*lineSpace, class, l.when(total), html.EscapeString(text))
	}
	b.WriteString("</svg>\n")
	return b.String()
}
